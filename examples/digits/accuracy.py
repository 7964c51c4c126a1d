"""How many of the questions in test.csv a model answers right.

python accuracy.py MODEL_DIR
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image

from checkpoint_convert.engine import open_engine
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.inference.request import Prompt


def main(model: str) -> None:
    with open("test.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    prompts = [
        Prompt([Turn("human", f"<image>\n{row['question']}")], [Image.open(Path("images", row["image"]))])
        for row in rows
    ]
    with open_engine(Path(model)) as engine:
        assert engine is not None  # this is the only rank
        answers = engine.answer(prompts, max_new_tokens=8)
    right = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        for question in (row["question"], "all questions"):
            right[question].append(answer.strip() == row["answer"])
    for question, results in right.items():
        print(f"{question:<28} {sum(results):>5} of {len(results):>5} right: {100 * sum(results) / len(results):.1f} %")


if __name__ == "__main__":
    main(sys.argv[1])
