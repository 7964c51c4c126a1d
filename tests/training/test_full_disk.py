"""The disk of one rank's node fills while a checkpoint is written: the job continues, and so does its next start."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vlm.runtime.exit_codes import SAVED
from megatron_vlm.training.checkpoint.folder import latest_checkpoint, tracked_iteration
from tests.support.forked_ranks import ForkedRanks
from tests.training.kills import COMPARED
from tests.training.tiny_run import LAYOUTS, metrics, write_recipe

PATIENCE = 300
SMALL = 20_000
"""Bytes that a file of the rank may have, much less than its share of a checkpoint."""


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_full_disk(tmp_path: Path) -> None:
    """Older checkpoints stay and training continues; with space again, saves succeed. Then in the same layout, and in
    another, the run resumes as if nothing had happened.
    """
    recipe, save, log = write_recipe(tmp_path, train_iters=1000, save_interval=2), tmp_path / "run", tmp_path / "log"
    unbroken, ranks = tmp_path / "unbroken", ForkedRanks()

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline and not ranks.has_ended(), log.read_text()[-3000:]
            time.sleep(0.005)

    def tracked() -> int:
        return tracked_iteration(save) or 0

    def finish(folder: Path, last: int, layout: str = "dp2") -> None:
        flags = ("--exit-interval", str(last), *LAYOUTS[layout])
        ranks.start("--config", recipe, "--save", folder, *flags, ranks=2, log=log)
        assert ranks.wait(PATIENCE) == SAVED, log.read_text()[-3000:]

    try:
        _, second = ranks.start("--config", recipe, "--save", save, ranks=2, log=log)
        wait_for(lambda: tracked() >= 2)
        before = resource.prlimit(second, resource.RLIMIT_FSIZE, (SMALL, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        wait_for(lambda: "could not be written: rank 1: File too large" in log.read_text())
        kept = tracked()
        newest = latest_checkpoint(save)
        assert newest is not None and newest.name == f"iter_{kept:07}"
        assert "Training continues; the next checkpoint is tried as usual" in log.read_text()
        resource.prlimit(second, resource.RLIMIT_FSIZE, before)
        wait_for(lambda: tracked() > kept)
        time.sleep(0.2)
        os.kill(second, signal.SIGKILL)
        ranks.wait(PATIENCE)
        last = tracked() + 4
        finish(save, last)
        finish(unbroken, last)
        assert [{key: line[key] for key in COMPARED} for line in metrics(save)] == [
            {key: line[key] for key in COMPARED} for line in metrics(unbroken)
        ]
        finish(save, last + 2, "tp2")
        finish(unbroken, last + 2)
        for line, expected in zip(metrics(save), metrics(unbroken), strict=True):
            assert line["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-5), line["iteration"]
    finally:
        ranks.close()
