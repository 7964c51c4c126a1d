"""Jobs killed at various moments and resumed: every sample is trained on as often as the mixture says."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_vlm.config import load_recipe
from megatron_vlm.data.loader import RowLoader, build_loader
from megatron_vlm.data.prepare.shard_writer import prepare_shards
from megatron_vlm.data.sample_log import read_samples
from tests.data.helpers import mixed_folder
from tests.support.launch import ROOT
from tests.training.tiny_run import LAYOUTS, metrics, run, write_recipe

TIMEOUT_SECONDS = 300


@dataclass
class Job:
    """One start of the run; each has another number of ranks than the previous one."""

    data_ranks: int
    rows_per_step: int
    workers: int
    layout: str = "dp2"
    """`dp2` has data parallelism only; the other layouts double the number of ranks."""
    killed_while: str = "training"
    """training: some steps after a checkpoint; saving: while a checkpoint is written; starting: while data is opened
    and planned, or workers start.
    """

    @property
    def ranks(self) -> int:
        return self.data_ranks * (1 if self.layout == "dp2" else 2)

    def flags(self, save: Path, iterations: int) -> list[str]:
        return [
            "--save", str(save), "--save-interval", "2", "--log-samples", "--global-batch-size",
            str(self.rows_per_step), "--num-workers", str(self.workers), "--train-iters", str(iterations),
            *LAYOUTS[self.layout],
        ]  # fmt: skip


TWO = [Job(2, 6, 2, killed_while="saving"), Job(1, 5, 0), Job(2, 4, 1)]
"""The last job of each list is not killed."""
TEN = [
    Job(2, 4, 2, killed_while="starting"),
    Job(2, 4, 2),
    Job(1, 3, 0, killed_while="saving"),
    Job(4, 8, 1),
    Job(2, 2, 1, "pp2", killed_while="starting"),
    Job(1, 5, 1, "tp2", killed_while="saving"),
    Job(3, 6, 2),
    Job(2, 6, 4, "cp2"),
    Job(4, 4, 0, killed_while="saving"),
    Job(1, 2, 2, killed_while="starting"),
    Job(3, 3, 1),
]


def _write_recipe(folder: Path) -> Path:
    """An epoch of about 30 rows: a whole file, shards one and a half times, and a few sampled entries of a file."""
    recipe = write_recipe(folder, distributed_timeout_minutes=5)
    whole, sharded, chosen = (mixed_folder(folder / name, count) for name, count in SETS.items())
    for name, data in zip(SETS, (whole, sharded, chosen), strict=True):
        for number, entry in enumerate(data.entries):
            entry["id"] = f"{name}{number}"
            paths = entry.get("image", [])
            entry["image"] = [f"{name}/images/{path}" for path in ([paths] if isinstance(paths, str) else paths)]
    prepare_shards([sharded.write()], folder, folder / "shards", 1, size_limit=800)
    assert len(list((folder / "shards").rglob("*.mds"))) > 16
    mix = {
        "datasets": [
            {"json_path": str(whole.write())},
            {"shard_path": str(folder / "shards"), "repeat": 1.5},
            {"json_path": str(chosen.write()), "choose": CHOSEN},
        ]
    }
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    settings = yaml.safe_load(recipe.read_text())
    settings["data"] |= {"data_path": [str(folder / "mix.yaml")], "image_folder": str(folder)}
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


SETS, CHOSEN = {"whole": 13, "sharded": 24, "chosen": 20}, 7


def _check_shares(epoch: list[str]) -> frozenset[str]:
    """Assert that an epoch has every sample as often as the mixture says. Returns the sampled ones."""
    times = Counter(epoch)
    per_set = {name: {k: n for k, n in times.items() if k.startswith(name)} for name in SETS}
    assert per_set["whole"] == {f"whole{number}": 1 for number in range(SETS["whole"])}
    assert set(per_set["sharded"].values()) == {1, 2} and len(per_set["sharded"]) == SETS["sharded"]
    assert sum(per_set["sharded"].values()) == SETS["sharded"] * 3 // 2
    assert set(per_set["chosen"].values()) == {1} and len(per_set["chosen"]) == CHOSEN
    return frozenset(per_set["chosen"])


def _tracked(save: Path) -> int:
    tracker = save / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def _saving(save: Path) -> bool:
    """Whether there is an unfinished checkpoint, newer than the one to resume from."""
    newest = max((int(path.name[5:].partition(".")[0]) for path in save.glob("iter_*")), default=0)
    return newest > _tracked(save)


def _reached(save: Path) -> int:
    """The last iteration that a run has logged; the file may be written to at the same time."""
    try:
        return len(metrics(save))
    except (FileNotFoundError, ValueError):
        return 0


def _start_and_kill(recipe: Path, job: Job, save: Path, generator: random.Random) -> None:
    """Start a job, wait for the moment `job.killed_while`, and kill all its processes at once."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.ranks),
        "-m", "megatron_vlm.train", "--config", str(recipe), *job.flags(save, 1000),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    log, target, saved = save.parent / "log", _tracked(save) + generator.randint(2, 5), _tracked(save)

    def is_time() -> bool:
        output = log.read_text()
        if job.killed_while == "starting":
            return "starting from" in output or "resuming after" in output
        if "data: " not in output:  # a resumed run first truncates its logs: until then they show the previous run
            return False
        if job.killed_while == "saving":
            return _tracked(save) > saved and _saving(save)
        return _reached(save) >= target

    with log.open("w") as stream:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    started = time.monotonic()
    try:
        while not is_time():
            assert launcher.poll() is None and time.monotonic() - started < TIMEOUT_SECONDS, log.read_text()[-3000:]
            time.sleep(0.005)
        if job.killed_while != "saving":
            time.sleep(generator.random() * 0.5)
    finally:
        processes = [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]
        for process in processes:
            process.send_signal(signal.SIGKILL)
        launcher.wait()
        psutil.wait_procs(processes, timeout=10)


def _uninterrupted(recipe: Path) -> RowLoader:
    read = load_recipe(recipe)
    read.training.global_batch_size = 1
    return build_loader(read, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=False)


def _resume_after_kills(folder: Path, jobs: list[Job], seed: int) -> None:
    generator = random.Random(seed)
    recipe, save = _write_recipe(folder), folder / "run"
    unfinished = 0
    *killed, last = jobs
    for job in killed:
        _start_and_kill(recipe, job, save, generator)
        unfinished += job.killed_while == "saving" and _saving(save)
    assert unfinished or not any(job.killed_while == "saving" for job in killed)
    run(recipe, None, *last.flags(save, _tracked(save) + 6), ranks=last.ranks)
    done = read_samples(save)
    assert [number for number, _ in done] == list(range(len(done))) and len(done) >= 6 * last.rows_per_step
    loader = _uninterrupted(recipe)
    assert done == [(number, next(loader).sample_ids) for number in range(len(done))]
    epochs: dict[int, list[str]] = {}
    for number, ids in done:
        epochs.setdefault(loader.plan.row(number).epoch, []).extend(ids)
    sampled = [_check_shares(ids) for ids in list(epochs.values())[:-1]]
    assert sampled and all(a != b for a, b in pairwise(sampled))
    samples = sum(len(ids) for _, ids in done)
    print(
        f"{len(killed)} kills ({dict(Counter(job.killed_while for job in killed))}, {unfinished} left a checkpoint "
        f"unfinished): {len(done)} rows, {samples} samples, {len(sampled)} whole epochs"
    )


@pytest.mark.timeout(600)
def test_two_kills(tmp_path: Path) -> None:
    _resume_after_kills(tmp_path, TWO, seed=0)


@pytest.mark.full
@pytest.mark.timeout(2400)
def test_ten_kills(tmp_path: Path) -> None:
    _resume_after_kills(tmp_path, TEN, seed=1)
