"""Runs that are asked to stop save and say so with their exit code; a rank that hangs ends with stacks of all ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from megatron_vlm.runtime.exit_codes import FAILED, SAVED, WRONG_SETTINGS
from tests.support.forked_ranks import ForkedRanks
from tests.support.launch import ROOT, kill_tree
from tests.training.tiny_run import metrics, run, write_recipe

A_MINUTE = 60


def _start(*command: str, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )


@pytest.mark.parametrize(
    ("number", "to_all"), [(signal.SIGUSR1, False), pytest.param(signal.SIGTERM, True, marks=pytest.mark.full)]
)
def test_a_signal_saves_and_the_same_command_resumes(tmp_path: Path, number: int, to_all: bool) -> None:
    """To torchrun's process alone, or, as schedulers do, to all processes of the job, loader workers included."""
    recipe, save, log = write_recipe(tmp_path, train_iters=100_000), tmp_path / "run", tmp_path / "log"
    flags = ("--config", str(recipe), "--save", str(save), "--save-interval", "1000000")
    job = _start(
        "-m", "megatron_vlm.launch", "--standalone", "--nproc-per-node", "2", "-m", "megatron_vlm.train", *flags,
        log=log,
    )  # fmt: skip
    try:
        started = time.monotonic()
        while not ((save / "metrics.jsonl").is_file() and len(metrics(save)) >= 2):
            assert job.poll() is None and time.monotonic() - started < 200, log.read_text()[-3000:]
            time.sleep(0.2)
        for process in [*(psutil.Process(job.pid).children(recursive=True) if to_all else []), job]:
            process.send_signal(number)
        assert job.wait(timeout=A_MINUTE) in (128 + number, SAVED), log.read_text()[-3000:]
    finally:
        kill_tree(job.pid)
    text = log.read_text()
    assert f"{signal.Signals(number).name} was received" in text and f"resumes from {save}" in text
    last = metrics(save)[-1]["iteration"]
    assert (save / f"iter_{last:07}").is_dir() and f"stopped after iteration {last}" in text
    if not to_all:
        resumed = run(recipe, save, "--save-interval", "1000000", "--train-iters", str(last + 1), ranks=2)
        assert f"resuming after iteration {last}" in resumed.stdout


def test_exit_codes(tmp_path: Path) -> None:
    recipe, save = write_recipe(tmp_path), tmp_path / "run"
    command = ("-m", "megatron_vlm.launch", "--standalone", "--nproc-per-node", "1", "-m", "megatron_vlm.train")
    flags = ("--config", str(recipe), "--save", str(save), "--exit-interval", "2")
    log = tmp_path / "log"
    assert _start(*command, *flags, log=log).wait(timeout=200) == SAVED, log.read_text()[-3000:]
    assert (save / "iter_0000002").is_dir() and len(metrics(save)) == 2
    assert "exit_interval is 2" in log.read_text()
    assert run(recipe, save, "--exit-duration-in-mins", "0.001", check=False).returncode == SAVED
    assert (save / "iter_0000003").is_dir() and len(metrics(save)) == 3
    assert _start(*command, *flags, "--lr", "-1", log=log).wait(timeout=200) == WRONG_SETTINGS


def test_a_rank_that_hangs_ends_all_with_their_stacks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with closing(ForkedRanks()) as ranks:
        ranks.start_command("-m", "tests.training.run_hang", ranks=2, log=log, terminate=True)
        assert ranks.wait(timeout=300) == FAILED
    waits, hangs = log.read_text().split("Timeout (")[-2:]
    assert "in all_reduce" in waits and "a_disk_that_does_not_answer" not in waits
    assert "in a_disk_that_does_not_answer" in hangs and "in all_reduce" not in hangs
