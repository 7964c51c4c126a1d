"""A failure ends the whole job soon, with a message."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.launch import ROOT, kill_tree
from tests.training.tiny_run import LAYOUTS, metrics, run, write_recipe

A_MINUTE = 60


def _ranks(job: psutil.Process) -> list[psutil.Process]:
    return [p for p in job.children() if "megatron_vlm.train" in " ".join(p.cmdline())]


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_a_killed_rank_ends_the_others(tmp_path: Path, layout: str) -> None:
    recipe = write_recipe(tmp_path, train_iters=100_000)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "megatron_vlm.train", "--config", str(recipe),
        "--save", str(tmp_path / "run"), "--save-interval", "1000000", *LAYOUTS[layout],
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        started = time.monotonic()
        while not ((tmp_path / "run" / "metrics.jsonl").is_file() and len(metrics(tmp_path / "run")) >= 2):
            assert job.poll() is None and time.monotonic() - started < 200, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.5)
        ranks = _ranks(psutil.Process(job.pid))
        assert len(ranks) == 2
        ranks[1].send_signal(signal.SIGKILL)
        assert job.wait(timeout=A_MINUTE) != 0
        _, alive = psutil.wait_procs(ranks, timeout=5)
        assert not alive
    finally:
        kill_tree(job.pid)


def test_an_image_damaged_after_indexing_names_the_sample(tmp_path: Path) -> None:
    """Images that were valid when lengths were measured and cannot be decoded in training: an error, not a hang."""
    recipe = write_recipe(tmp_path)
    run(recipe, None, "--train-iters", "1")
    for image in (tmp_path / "data" / "images").iterdir():
        image.write_bytes(b"not an image any more")
    done = run(recipe, None, *LAYOUTS["pp2"], ranks=2, check=False)
    assert done.returncode != 0
    assert "RowError" in done.stdout and "'s" in done.stdout


def test_an_empty_dataset_and_a_folder_without_index_are_reported(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "empty.json").write_text(json.dumps([]))
    done = run(recipe, None, "--data-path", str(tmp_path / "empty.json"), check=False)
    assert done.returncode == 1 and "empty" in done.stdout and "Traceback" not in done.stdout
    (tmp_path / "shards").mkdir()
    done = run(recipe, None, "--data-path", str(tmp_path / "shards"), check=False)
    assert done.returncode != 0 and "index.json" in done.stdout and "Traceback" not in done.stdout


def test_all_wrong_settings_are_reported_together(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    flags = ("--tensor-model-parallel-size", "3", "--global-batch-size", "0", "--lr", "-1")
    done = run(recipe, None, *flags, check=False)
    assert done.returncode == 2
    for setting in ("tensor_model_parallel_size", "global_batch_size", "lr"):
        assert setting in done.stdout
