"""Jobs of which a rank, or all, are killed at various moments, saves included, and that resume.

In the same layout they continue bit for bit. In other layouts every sample is trained on as often as the mixture says.
No checkpoint that was reported is lost, and none that is torn is ever the newest.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from megatron_vlm.config import load_recipe
from megatron_vlm.data.loader import RowLoader, build_loader
from megatron_vlm.data.prepare.shard_writer import prepare_shards
from megatron_vlm.data.sample_log import read_samples
from megatron_vlm.runtime.exit_codes import SAVED
from megatron_vlm.training.checkpoint.folder import latest_checkpoint
from tests.data.helpers import mixed_folder
from tests.support.forked_ranks import ForkedRanks
from tests.training.tiny_run import LAYOUTS, metrics, write_recipe

TIMEOUT_SECONDS = 300
LONG = 1000
"""Iterations of the schedule; no job gets that far."""
COMPARED = ("iteration", "lm_loss", "grad_norm", "learning_rate", "tokens", "loss_tokens", "tiles", "rows")


@dataclass
class Job:
    """One start of the run."""

    data_ranks: int
    rows_per_step: int
    workers: int
    layout: str = "dp2"
    """`dp2` has data parallelism only; the other layouts double the number of ranks."""
    killed_while: str = "training"
    """training: some steps after a checkpoint; saving: while a checkpoint is written; starting: while data is opened
    and planned, or workers start.
    """
    all_at_once: bool = False
    """As when the only node loses power; otherwise one rank, by chance, is killed."""

    @property
    def ranks(self) -> int:
        return self.data_ranks * (1 if self.layout == "dp2" else 2)

    def flags(self, save: Path, iterations: int) -> list[str]:
        return [
            "--save", str(save), "--save-interval", "2", "--log-samples", "--global-batch-size",
            str(self.rows_per_step), "--num-workers", str(self.workers), "--train-iters", str(iterations),
            *LAYOUTS[self.layout],
        ]  # fmt: skip


TWO = [Job(2, 6, 2, killed_while="saving", all_at_once=True), Job(1, 5, 0), Job(2, 4, 1)]
"""Each job has another number of ranks than the previous one. The last job of each list is not killed."""
TEN = [
    Job(2, 4, 2, killed_while="starting"),
    Job(2, 4, 2),
    Job(1, 3, 0, killed_while="saving"),
    Job(4, 8, 1, all_at_once=True),
    Job(2, 2, 1, "pp2", killed_while="starting"),
    Job(1, 5, 1, "tp2", killed_while="saving"),
    Job(3, 6, 2),
    Job(2, 6, 4, "cp2"),
    Job(4, 4, 0, killed_while="saving", all_at_once=True),
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


def _start_and_kill(ranks: ForkedRanks, recipe: Path, job: Job, save: Path, generator: random.Random) -> None:
    """Start a job, wait for the moment `job.killed_while`, and kill one of its ranks, or all at once."""
    log, before = save.parent / "log", _tracked(save)
    target = before + generator.randint(2, 5)
    log.write_text("")

    def is_time() -> bool:
        output = log.read_text()
        if job.killed_while == "starting":
            return "starting from" in output or "resuming after" in output
        if "data: " not in output:  # a resumed run first truncates its logs: until then they show the previous run
            return False
        if job.killed_while == "saving":
            return _tracked(save) > before and _saving(save)
        return _reached(save) >= target

    pids = ranks.start("--config", recipe, *job.flags(save, LONG), ranks=job.ranks, log=log)
    started = time.monotonic()
    while not is_time():
        in_time = time.monotonic() - started < TIMEOUT_SECONDS
        assert in_time and not ranks.has_ended(), log.read_text()[-3000:]
        time.sleep(0.005)
    time.sleep(generator.random() * (0.05 if job.killed_while == "saving" else 0.5))
    for pid in pids if job.all_at_once else generator.sample(pids, 1):
        with suppress(ProcessLookupError):  # it has ended because of another one
            os.kill(pid, signal.SIGKILL)
    assert ranks.wait(TIMEOUT_SECONDS) != 0, log.read_text()[-3000:]
    reported = [int(number) for number in re.findall(r"saved .*iter_(\d+)", log.read_text())]
    assert _tracked(save) >= max(reported, default=before), "a checkpoint that was reported is lost"
    found = latest_checkpoint(save)
    assert found is None or int(found.name[5:]) >= _tracked(save), "the newest one is not whole"


def _finish(ranks: ForkedRanks, recipe: Path, job: Job, save: Path, last: int) -> None:
    """Start a job that nobody kills; it stops after iteration `last`."""
    log = save.parent / "log"
    flags = (*job.flags(save, LONG), "--exit-interval", str(last))
    ranks.start("--config", recipe, *flags, ranks=job.ranks, log=log)
    assert ranks.wait(TIMEOUT_SECONDS) == SAVED, log.read_text()[-3000:]


def _uninterrupted(recipe: Path) -> RowLoader:
    read = load_recipe(recipe)
    read.training.global_batch_size = 1
    return build_loader(read, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=False)


def _kill_all(ranks: ForkedRanks, recipe: Path, jobs: list[Job], save: Path, generator: random.Random) -> str:
    """Start and kill the jobs, in order. Returns what happened, for the log."""
    unfinished = 0
    for job in jobs:
        _start_and_kill(ranks, recipe, job, save, generator)
        unfinished += job.killed_while == "saving" and _saving(save)
    assert unfinished or sum(job.killed_while == "saving" for job in jobs) < 4, "no save was interrupted"
    moments = dict(Counter(job.killed_while for job in jobs))
    return f"{len(jobs)} kills ({moments}, {unfinished} left a checkpoint unfinished)"


def _resume_in_other_layouts(ranks: ForkedRanks, folder: Path, jobs: list[Job], seed: int) -> None:
    recipe, save = _write_recipe(folder), folder / "run"
    *killed, last = jobs
    happened = _kill_all(ranks, recipe, killed, save, random.Random(seed))
    _finish(ranks, recipe, last, save, _tracked(save) + 6)
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
    print(f"{happened}: {len(done)} rows, {samples} samples, {len(sampled)} whole epochs")


def _resume_in_the_same_layout(ranks: ForkedRanks, folder: Path, jobs: list[Job], seed: int) -> None:
    """The run has the metrics of one that nobody killed, bit for bit, and the same samples."""
    recipe, save, unbroken = _write_recipe(folder), folder / "run", folder / "unbroken"
    happened = _kill_all(ranks, recipe, jobs, save, random.Random(seed))
    last = _tracked(save) + 4
    for path in (save, unbroken):
        _finish(ranks, recipe, jobs[-1], path, last)
    kept = [[{key: line[key] for key in COMPARED} for line in metrics(path)] for path in (save, unbroken)]
    assert kept[0] == kept[1] and len(kept[0]) == last
    assert read_samples(save) == read_samples(unbroken)
    print(f"{happened}: {last} iterations as without")


@pytest.fixture(scope="module")
def ranks() -> Iterator[ForkedRanks]:
    forked = ForkedRanks()
    yield forked
    forked.close()


def _same(layout: str, kills: int) -> list[Job]:
    moments = ("saving", "training", "starting", "saving")
    return [Job(2 if layout == "dp2" else 1, 4, 1, layout, moments[n % 4], n % 3 == 2) for n in range(kills)]


@pytest.mark.timeout(600)
def test_three_kills(ranks: ForkedRanks, tmp_path: Path) -> None:
    _resume_in_the_same_layout(ranks, tmp_path, _same("dp2", 3), seed=0)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_two_kills_and_other_layouts(ranks: ForkedRanks, tmp_path: Path) -> None:
    _resume_in_other_layouts(ranks, tmp_path, TWO, seed=0)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("layout", "kills"), [("dp2", 14), ("pp2", 8), ("tp2", 8)])
def test_thirty_kills(ranks: ForkedRanks, tmp_path: Path, layout: str, kills: int) -> None:
    _resume_in_the_same_layout(ranks, tmp_path, _same(layout, kills), seed=1)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_twenty_kills_and_other_layouts(ranks: ForkedRanks, tmp_path: Path) -> None:
    _resume_in_other_layouts(ranks, tmp_path, [*TEN[:-1], *TEN], seed=1)
