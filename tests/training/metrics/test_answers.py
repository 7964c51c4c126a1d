"""Generated answers as lines and pictures; what a killed run wrote after its checkpoint is removed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_vlm.config import Recipe
from megatron_vlm.training.metrics import Answer
from megatron_vlm.training.metrics.writers import open_writers


def test_a_panel_has_the_images_and_room_for_all_lines() -> None:
    red, blue = Image.new("RGB", (800, 400), (255, 0, 0)), Image.new("L", (5, 3000))
    short = Answer("s1", "What?", "This.", "That.", []).panel()
    with_images = Answer("s1", "What?", "This.", "That.", [red, blue]).panel()
    pixels = np.asarray(with_images)
    assert (pixels[20, 20] == (255, 0, 0)).all(), "the first image is on the left"
    assert with_images.width > short.width and with_images.height > 160 + 320
    long = Answer("s1", "word " * 60, "x" * 500, "line\n" * 100, []).panel()
    assert short.height < long.height < 1200
    assert Answer("s1", "", "", "", []).panel().height > 0


def test_a_resumed_run_removes_the_answers_after_its_checkpoint(tmp_path: Path) -> None:
    for first_iteration, iterations in ((0, (1, 2, 3)), (1, (2,))):
        writers = open_writers(Recipe(), tmp_path, first_iteration)
        for iteration in iterations:
            for writer in writers:
                writer.write_answers(iteration, [Answer("s1", "What?", "This.", f"{first_iteration}", [])])
        for writer in writers:
            writer.close()
    lines = [json.loads(line) for line in (tmp_path / "generated_samples.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["generated"]) for line in lines] == [(1, "0"), (2, "1")]
    assert list(lines[0]) == ["iteration", "id", "question", "answer", "generated"]
