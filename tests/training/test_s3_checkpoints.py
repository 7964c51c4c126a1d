"""A run that saves to an S3 store, killed in mid-save, continues as if nothing had happened, on another node, too."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.sample_log import read_samples
from megatron_vlm.runtime.launch import process_group
from megatron_vlm.runtime.s3 import objects
from megatron_vlm.runtime.s3.path import S3Path
from megatron_vlm.training.checkpoint import CheckpointError, checkpoint_to_resume, latest_checkpoint
from tests.support.launch import ROOT
from tests.support.s3_server import BUCKET, Fault, Proxy, store, wait_for
from tests.training.tiny_run import metrics, run, write_recipe

URL = f"s3://{BUCKET}/run"
COMPARED = ("iteration", "lm_loss", "grad_norm", "learning_rate", "tokens", "loss_tokens", "tiles", "rows")


def logged(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: line[name] for name in COMPARED} for line in lines]


def fetch(url: str, folder: Path) -> Path:
    """All objects below a prefix as files."""
    for name in objects.list_names(url):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(objects.read_bytes(f"{url}/{name}"))
    return folder


@contextmanager
def started(recipe: Path, log: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run inside the block, killed at its end."""
    command = [sys.executable, "-m", "megatron_vlm.train", "--config", str(recipe), "--save", URL, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(log.parent)}
    with log.open("w") as output:
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield job
            assert job.poll() is None, log.read_text()[-3000:]
        finally:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with store() as running:
        yield running


def node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node: nothing of an earlier start is in its temporary folder."""
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))


@pytest.mark.timeout(600)
def test_killed_in_mid_save(tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, train_iters=6, save_interval=2, save_total_limit=2)
    run(recipe, tmp_path / "local", "--log-samples")
    proxy.faults.append(Fault("hang", "run/iter_0000004/common.pt", method="PUT"))
    (tmp_path / "node1").mkdir()
    with started(recipe, tmp_path / "node1/log", "--log-samples") as job:
        reached = ("PUT", f"/{BUCKET}/run/iter_0000004/common.pt")
        wait_for(lambda: job.poll() is not None or reached in proxy.requests, 240)
    proxy.faults.clear()
    assert str(latest_checkpoint(URL)) == f"{URL}/iter_0000002"
    assert "iter_0000004/.metadata" in objects.list_names(URL), "everything but the last files had been written"

    node(tmp_path / "node2", monkeypatch)
    output = run(recipe, None, "--save", URL, "--log-samples").stdout
    assert f"resuming after iteration 2 from {URL}/iter_0000002" in output
    assert f"saved {URL}/iter_0000006" in output
    found = fetch(URL, tmp_path / "fetched")
    assert logged(metrics(found)) == logged(metrics(tmp_path / "local"))
    assert read_samples(found) == read_samples(tmp_path / "local") and len(read_samples(found)) == 24
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in (tmp_path / "local").iterdir())
    assert len(list((found / "tensorboard").iterdir())) == 2, "one file of each start"


def test_which_is_resumed_and_errors(proxy: Proxy, tmp_path: Path) -> None:
    for iteration in (10, 20):
        for name in (".metadata", "recipe.json"):
            objects.write(b"{}", f"{URL}/iter_00000{iteration}/{name}")
    with process_group():
        assert checkpoint_to_resume(str(tmp_path / "new"), f"{URL}/") == S3Path(f"{URL}/iter_0000020")
        assert checkpoint_to_resume(f"{URL}/", None) == S3Path(f"{URL}/iter_0000020")
        assert checkpoint_to_resume(f"s3://{BUCKET}/new", f"s3://{BUCKET}/new/") is None
        with pytest.raises(CheckpointError, match="training.save: cannot write s3://absent/run/.*NoSuchBucket"):
            checkpoint_to_resume("s3://absent/run", URL)
        with pytest.raises(CheckpointError, match="training.load: cannot list s3://absent/run.*NoSuchBucket"):
            checkpoint_to_resume(None, "s3://absent/run")
        with pytest.raises(CheckpointError, match=f"s3://{BUCKET}/other holds no finished checkpoint"):
            checkpoint_to_resume(str(tmp_path / "new"), f"s3://{BUCKET}/other")


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_killed_at_random_moments(tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty times, saving after every iteration: what is newest is always whole and never older than before."""
    generator = random.Random(7)
    iterations = 60
    recipe = write_recipe(tmp_path, train_iters=iterations, save_interval=1, save_total_limit=2)
    newest = 0
    for start in range(20):
        folder = tmp_path / f"node{start}"
        folder.mkdir()
        proxy.requests.clear()
        with started(recipe, folder / "log", "--log-samples") as job:
            writes = generator.randint(1, 25)  # until so many requests have written something
            wait_for(lambda: job.poll() is not None or _writes(proxy) >= writes, 240)  # noqa: B023
            time.sleep(generator.random() * 0.05)
        found = latest_checkpoint(URL)
        if found is not None:
            now = int(found.name[5:12])
            assert now >= newest
            newest = now
    node(tmp_path / "last", monkeypatch)
    run(recipe, None, "--save", URL, "--log-samples")
    run(recipe, tmp_path / "local", "--log-samples")
    found_files = fetch(URL, tmp_path / "fetched")
    assert newest > 0 and logged(metrics(found_files)) == logged(metrics(tmp_path / "local"))
    assert read_samples(found_files) == read_samples(tmp_path / "local")
    print(f"killed 20 times up to iteration {newest}")


def _writes(proxy: Proxy) -> int:
    return sum(method in ("PUT", "POST", "DELETE") for method, path in proxy.requests if "run/" in path)
