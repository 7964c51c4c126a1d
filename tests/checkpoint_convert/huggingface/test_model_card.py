"""README.md of an export has what the checkpoint and its log say, nothing else, and its example code runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.huggingface.model_card import write_model_card
from checkpoint_convert.huggingface.safetensors import TensorSpec
from megatron_vlm.config import Recipe
from megatron_vlm.training.checkpoint import Progress
from tests.checkpoint_convert.whole_model import WIDE, picture
from tests.support.random_models import write_llava_next

PLAN = [TensorSpec("a", (3, 5), torch.bfloat16), TensorSpec("b", (7,), torch.bfloat16)]


def _card(folder: Path, recipe: Recipe, progress: Progress, format: str = "llava_next") -> list[str]:
    write_model_card(folder, "mine", folder, recipe, progress, format, PLAN)
    return (folder / "README.md").read_text().splitlines()


def _log(folder: Path, *iterations: int) -> None:
    lines = [{"iteration": i, "tokens": 1000 * i, "loss_tokens": i, "lm_loss": 1 / i} for i in iterations]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_training_is_described(tmp_path: Path) -> None:
    recipe = Recipe()
    recipe.training.trainable = ["projector"]
    recipe.training.pretrained_checkpoint = "/home/someone/start"
    recipe.data.data_path = ["/home/someone/captions.yaml"]
    _log(tmp_path, *range(1, 31))
    lines = _card(tmp_path, recipe, Progress(iteration=20, consumed_rows=320))
    for row in (
        "# mine",
        "| parameters | 22, bfloat16 |",
        "| iterations | 20 of 1,000 |",
        "| rows | 320 of 32,768 tokens, 16 per iteration |",
        "| tokens | 210,000, 210 of them supervised |",
        f"| loss | {sum(1 / i for i in range(11, 21)) / 10:.4f}, mean of the last 10 iterations |",
        "| trained parts | projector (frozen: vision, language) |",
        "| data | captions.yaml |",
        "| started from | start |",
    ):
        assert row in lines
    assert "/home" not in "\n".join(lines), "paths are private"
    assert not any(line.startswith("license") for line in lines), "the user states it"


@pytest.mark.parametrize("damage", ["no log", "an iteration is missing", "truncated"])
def test_what_is_not_in_the_log_is_left_out(tmp_path: Path, damage: str) -> None:
    _log(tmp_path, 1, 2, 3)
    log = tmp_path / "metrics.jsonl"
    if damage == "no log":
        log.unlink()
    elif damage == "truncated":
        log.write_text(log.read_text()[:-20])
    else:
        _log(tmp_path, 1, 3)
    lines = _card(tmp_path, Recipe(), Progress(iteration=3))
    assert "| iterations | 3 of 1,000 |" in lines
    assert not any(line.startswith(("| tokens", "| loss")) for line in lines)


def test_untrained_weights_are_described_as_such(tmp_path: Path) -> None:
    lines = _card(tmp_path, Recipe(), Progress(), "instellavl")
    assert "Converted from other weights, and not trained since." in lines
    assert not any(line.startswith(("| iterations", "| optimizer")) for line in lines)
    assert any("trust_remote_code=True" in line for line in lines)


def test_example_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_llava_next(tmp_path / "source")
    assert hf_to_megatron.main(["--model", str(tmp_path / "source"), "--save", str(tmp_path / "megatron")]) == 0
    monkeypatch.chdir(tmp_path)
    assert megatron_to_hf.main(["--load", "megatron", "--save", "exported", "--format", "llava_next"]) == 0
    picture(WIDE).save("image.jpg")
    capsys.readouterr()
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "exported" / "README.md").read_text(), re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.strip()
