"""Real jobs, killed at moments that nobody chose: in the end every sample was trained on once, in the one order."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from megatron_vlm.config import load_recipe
from megatron_vlm.data.loader import build_loader
from megatron_vlm.training.sample_log import read_samples
from tests.launch import ROOT
from tests.training.tiny_run import metrics, run, write_recipe

JOBS = [(2, 4, 2), (1, 3, 0), (4, 8, 1), (2, 2, 1), (3, 6, 2), (1, 5, 1), (4, 4, 0), (2, 6, 1), (1, 2, 2), (3, 3, 1)]
"""(data ranks, rows per step, workers) of each job that is killed; the last one of a test runs to its end."""
PATIENCE = 200


def _flags(job: tuple[int, int, int], save: Path, iterations: int) -> list[str]:
    _, rows, workers = job
    return [
        "--save", str(save), "--save-interval", "2", "--log-samples", "--global-batch-size", str(rows),
        "--num-workers", str(workers), "--train-iters", str(iterations),
    ]  # fmt: skip


def _reached(save: Path) -> int:
    """The last iteration a run has logged; the file may be cut back, or be written to, at this moment."""
    try:
        return len(metrics(save))
    except (FileNotFoundError, ValueError):
        return 0


def _kill_after(recipe: Path, job: tuple[int, int, int], save: Path, steps: int, delay: float) -> None:
    """Start a job, let it go `steps` iterations beyond the last checkpoint, and kill all of it at once."""
    tracker = save / "latest_checkpointed_iteration.txt"
    target = steps + (int(tracker.read_text()) if tracker.exists() else 0)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job[0]),
        "-m", "megatron_vlm.train", "--config", str(recipe), *_flags(job, save, 1000),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    log = save.parent / "log"
    with log.open("w") as stream:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    started = time.monotonic()
    try:
        # a run that goes on cuts its logs back first: what an earlier one reached does not count
        while "data: " not in log.read_text() or _reached(save) < target:
            assert launcher.poll() is None and time.monotonic() - started < PATIENCE, log.read_text()[-3000:]
            time.sleep(0.05)
        time.sleep(delay)
    finally:
        processes = [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]
        for process in processes:
            process.send_signal(signal.SIGKILL)
        launcher.wait()
        psutil.wait_procs(processes, timeout=10)


def _expected(recipe: Path, rows: int) -> list[tuple[int, list[str]]]:
    """The rows of a run that was never stopped."""
    read = load_recipe(recipe)
    read.training.global_batch_size = 1
    loader = build_loader(read, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=False)
    return [(number, next(loader).sample_ids) for number in range(rows)]


def _go_on_after_kills(folder: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    recipe, save = write_recipe(folder), folder / "run"
    for number in range(kills):
        _kill_after(recipe, JOBS[number % len(JOBS)], save, draw.randint(2, 6), draw.random() * 0.5)
    last = JOBS[kills % len(JOBS)]
    iterations = int((save / "latest_checkpointed_iteration.txt").read_text()) + 6
    run(recipe, None, *_flags(last, save, iterations), ranks=last[0])
    done = read_samples(save)
    assert all(b[0] == a[0] + 1 for a, b in pairwise(done)) and len(done) >= 6 * last[1]
    assert done == _expected(recipe, len(done))


@pytest.mark.timeout(300)
def test_two_kills(tmp_path: Path) -> None:
    _go_on_after_kills(tmp_path, kills=2, seed=0)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_ten_kills(tmp_path: Path) -> None:
    _go_on_after_kills(tmp_path, kills=10, seed=1)
