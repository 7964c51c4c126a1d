"""The best weights of a run on two ranks that saves to an object store: kept there, and exported from a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint_convert.megatron_to_hf import convert
from checkpoint_convert.verify import verify
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.runtime.s3 import objects
from tests.support.forked_ranks import ForkedRanks
from tests.support.s3_server import BUCKET, store
from tests.training.test_s3_checkpoints import fetch
from tests.training.tiny_run import metrics, write_recipe

URL = f"s3://{BUCKET}/run"


@pytest.mark.full
def test_the_best_weights_are_kept_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"train_iters": 6, "save_interval": 3, "eval_interval": 2, "eval_iters": 1, "best_metric": "eval_loss"}
    recipe, log = write_recipe(tmp_path, **settings), tmp_path / "log"
    tokens = str(len(load_tokenizer(tmp_path / "tokenizer")))  # an export needs the image token there
    (tmp_path / "node").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "node"))
    with store():
        ranks = ForkedRanks()
        try:
            for save in (str(tmp_path / "local"), URL):
                flags = ("--save", save, "--valid-share", "0.3", "--model.image-token-index", tokens)
                ranks.start("--config", recipe, *flags, ranks=2, log=log)
                assert ranks.wait(300) == 0, log.read_text()[-3000:]
        finally:
            ranks.close()
        left = objects.list_folder(f"{URL}/best")
        fetched = fetch(URL, tmp_path / "fetched")
    evaluated = [line for line in metrics(fetched) if "eval_loss" in line]
    best = min(evaluated, key=lambda line: line["eval_loss"])
    expected = [line["eval_loss"] for line in metrics(tmp_path / "local") if "eval_loss" in line]
    assert [line["eval_loss"] for line in evaluated] == expected and len(expected) == 3
    assert left == [f"iter_{best['iteration']:07}", "latest_checkpointed_iteration.txt", "tokenizer"]
    convert(fetched / "best", tmp_path / "exported")
    assert verify(tmp_path / "exported", tmp_path / "local" / "best", weights_only=True)
