"""Tasks of lmms-eval on a data set of its own: questions without an image, with one and with two."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image

from tests.checkpoint_convert.whole_model import SINGLE, TALL, WIDE, picture

QUESTIONS = 11
CHOICES = ["yes", "no", "a red one"]
_UTILS = """
import io
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(io.BytesIO(data)) for data in doc["images"]]
"""
_YAML = """\
task: {name}
output_type: {output_type}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {folder}/data.parquet
test_split: test
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""


def questions() -> list[tuple[str, list[Image.Image]]]:
    """Question and images of each document."""
    sizes = (SINGLE, TALL, WIDE)
    return [
        (f"What is number {i} here?", [picture(sizes[(i + k) % 3], seed=3 * i + k) for k in range((1, 0, 2)[i % 3])])
        for i in range(QUESTIONS)
    ]


def write_tasks(folder: Path) -> None:
    """Write the tasks `local_answers` and `local_choices` into the new `folder`."""
    folder.mkdir()
    rows = [
        {"question": text, "images": list(map(_png, images)), "answer": "yes", "choices": CHOICES}
        for text, images in questions()
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
    (folder / "utils.py").write_text(_UTILS)
    answers = _YAML.format(name="local_answers", output_type="generate_until", metric="exact_match", folder=folder)
    (folder / "answers.yaml").write_text(answers + "generation_kwargs:\n  max_new_tokens: 6\n")
    choices = _YAML.format(name="local_choices", output_type="multiple_choice", metric="acc", folder=folder)
    (folder / "choices.yaml").write_text(choices + "doc_to_choice: choices\n")


def _png(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()
