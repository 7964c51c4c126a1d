"""The published snippets run on the demo's model, trained for a few steps and exported in both formats."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import easy_vqa
import pytest
import yaml
from PIL import Image

from checkpoint_convert.megatron_to_hf import convert
from megatron_vlm.config import load_recipe, recipe_to_dict
from tests.examples.conftest import EXAMPLES
from tests.instellavl.exports import make_answers_end
from tests.instellavl.test_snippets import ask, compare
from tests.support.forked_ranks import launch_forked
from tests.support.launch import ROOT, launch

STEPS = 40
TRAINED_ON = 200
"""Conversations, enough for these steps; indexing more would only take time."""
SHAPES = {"as it is": (64, 64), "tall": (50, 130), "wide": (150, 40)}
"""(width, height) that test images are resized to."""
ANSWERS = {"yes", "no", *easy_vqa.SHAPES, *easy_vqa.COLOURS}


def image_of(archive: zipfile.ZipFile, name: str) -> Image.Image:
    """An image of the published data set, whose wheel is open: opening it reads the names of all its images."""
    split, file = name.split("/")
    return Image.open(io.BytesIO(archive.read(f"easy_vqa/data/{split}/images/{file}"))).convert("RGB")


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, wheel: Path, training: list[easy_vqa.Question], trained_tokenizer: Path
) -> Path:
    """Exports of the last stage's recipe, trained shortly in one process from random weights."""
    folder = tmp_path_factory.mktemp("demo")
    entries = easy_vqa.question_annotations(training, copies=1)[:TRAINED_ON]
    (folder / "questions.json").write_text(json.dumps(entries))
    (folder / "images").mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for entry in entries:
            picture = folder / "pictures" / entry["image"]
            picture.parent.mkdir(parents=True, exist_ok=True)
            image_of(archive, entry["image"]).save(picture)
        for number, (name, size) in enumerate(SHAPES.items()):
            image = image_of(archive, easy_vqa.image_name("test", number))
            image.resize(size).save(folder / "images" / f"{name}.png")
    recipe: dict[str, Any] = recipe_to_dict(load_recipe(EXAMPLES / "demo" / "instruct.yaml"))
    recipe["data"] |= {
        "data_path": [str(folder / "questions.json")],
        "image_folder": str(folder / "pictures"),
        "tokenizer_model": str(trained_tokenizer),
        "seq_length": 512,
    }
    recipe["training"] |= {
        "train_iters": STEPS,
        "global_batch_size": 1,
        "pretrained_checkpoint": None,
        "save": str(folder / "checkpoint"),
    }
    recipe["parallel"]["pipeline_model_parallel_size"] = 1
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launch_forked("-m", "megatron_vlm.train", "--config", folder / "recipe.yaml", ranks=1, timeout=240)
    for hf_format in ("llava_next", "instellavl"):
        convert(folder / "checkpoint", folder / hf_format, format=hf_format)
    make_answers_end(folder)  # without an image they do not end by themselves, because training had images only
    return folder


def test_snippets_answer_as_stock_transformers(exported: Path) -> None:
    compare(ask(exported))


@pytest.mark.full
def test_examples_of_the_docs_run(exported: Path) -> None:
    """All Python code of docs/inference.md, run as one script: four ways to get the same answer."""
    text = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
    script = 'questions, images = ["what color is the shape?"], [Image.open("shape.png")]\n'
    script = "from PIL import Image\n" + script + "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    for published, here in {
        "runs/demo/hf": exported / "llava_next",
        "runs/demo/instellavl": exported / "instellavl",
        "runs/demo/checkpoints/instruct": exported / "checkpoint",
        "shape.png": exported / "images" / "as it is.png",
    }.items():
        assert published in script
        script = script.replace(published, str(here))
    (exported / "docs.py").write_text(f"{script}\nprint(*answers)\n")
    lines = launch(exported / "docs.py", ranks=1, timeout=280).stdout.splitlines()
    answers = [line for line in lines if line in ANSWERS]
    assert len(answers) == 4 and len(set(answers)) == 1, lines
