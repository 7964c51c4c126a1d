"""Jobs of which a rank, or all, are killed at various moments, saves included, and that resume; on a disk or a store.

In the same layout they continue bit for bit. In other layouts every sample is trained on as often as the mixture says.
No checkpoint that was reported is lost, and none that is torn is ever the newest.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import yaml

from megatron_vlm.config import Recipe, load_recipe
from megatron_vlm.data.loader import RowLoader, build_loader
from megatron_vlm.data.prepare.shard_writer import prepare_shards
from megatron_vlm.data.sample_log import read_samples
from megatron_vlm.runtime.exit_codes import SAVED
from megatron_vlm.runtime.s3 import objects
from megatron_vlm.training.checkpoint.folder import latest_checkpoint, named_checkpoints, tracked_iteration
from megatron_vlm.training.run_files import run_folder
from tests.data.helpers import mixed_folder
from tests.support.forked_ranks import ForkedRanks
from tests.support.s3_server import Proxy
from tests.training.tiny_run import LAYOUTS, metrics, write_recipe

TIMEOUT_SECONDS = 600
LONG = 1000
"""Iterations of the schedule; no job gets that far."""
COMPARED = ("iteration", "lm_loss", "grad_norm", "learning_rate", "tokens", "loss_tokens", "tiles", "rows")
SETS, CHOSEN = {"whole": 13, "sharded": 24, "chosen": 20}, 7


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

    def flags(self, save: str) -> list[str]:
        return [
            "--save", save, "--save-interval", "2", "--log-samples", "--global-batch-size", str(self.rows_per_step),
            "--num-workers", str(self.workers), "--train-iters", str(LONG), *LAYOUTS[self.layout],
        ]  # fmt: skip


class Storage(Protocol):
    """Where a run saves."""

    save: str
    poll_seconds: float
    """Between two looks at it."""

    def begin(self) -> None:
        """A start follows."""

    def run_folder(self) -> Path:
        """The folder that the ranks of the current start log into."""

    def is_saving(self, before: int, target: int) -> bool:
        """Whether it is time to kill a job that began at iteration `before`, while it saves; `target` is random."""

    def fetched(self) -> Path:
        """A folder with the logs of all starts."""


class Disk:
    """A folder."""

    poll_seconds = 0.005

    def __init__(self, folder: Path) -> None:
        self.save, self._folder = str(folder), folder

    def begin(self) -> None:
        """Nothing: what the last start left stays."""

    def run_folder(self) -> Path:
        return self._folder

    def is_saving(self, before: int, target: int) -> bool:
        return tracked(self) > before and is_unfinished(self)

    def fetched(self) -> Path:
        return self._folder


class Store:
    """A prefix in an object store. Every start is on another node, which has nothing of an earlier one."""

    poll_seconds = 0.05

    def __init__(self, url: str, node: Path, proxy: Proxy) -> None:
        """`node` is the temporary folder of all processes."""
        self.save, self._node, self._proxy = url, node, proxy

    def begin(self) -> None:
        shutil.rmtree(self.run_folder(), ignore_errors=True)
        self._proxy.requests.clear()

    def run_folder(self) -> Path:
        recipe = Recipe()
        recipe.training.save = self.save
        folder = run_folder(recipe)
        assert folder is not None and folder.is_relative_to(self._node)
        return folder

    def is_saving(self, before: int, target: int) -> bool:
        """After a number of requests that write, which a save makes about ten of."""
        writes = sum(method in ("PUT", "POST", "DELETE") for method, _ in self._proxy.requests)
        return writes >= 8 * target

    def fetched(self) -> Path:
        folder = self._node / "fetched"
        for name in objects.list_names(self.save):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(objects.read_bytes(f"{self.save}/{name}"))
        return folder


def write_mixed_recipe(folder: Path) -> Path:
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


def _check_shares(epoch: list[str]) -> frozenset[str]:
    """Assert that an epoch has every sample as often as the mixture says. Returns the sampled ones."""
    times = Counter(epoch)
    per_set = {name: {k: n for k, n in times.items() if k.startswith(name)} for name in SETS}
    assert per_set["whole"] == {f"whole{number}": 1 for number in range(SETS["whole"])}
    assert set(per_set["sharded"].values()) == {1, 2} and len(per_set["sharded"]) == SETS["sharded"]
    assert sum(per_set["sharded"].values()) == SETS["sharded"] * 3 // 2
    assert set(per_set["chosen"].values()) == {1} and len(per_set["chosen"]) == CHOSEN
    return frozenset(per_set["chosen"])


def tracked(storage: Storage) -> int:
    """The iteration that the tracker names; 0 for none."""
    return tracked_iteration(storage.save) or 0


def is_unfinished(storage: Storage) -> bool:
    """Whether there is a checkpoint that is not finished and newer than the one to resume from."""
    if isinstance(storage, Disk):
        numbers = [int(path.name[5:].partition(".")[0]) for path in Path(storage.save).glob("iter_*")]
    else:
        numbers = [iteration for iteration, _, _ in named_checkpoints(storage.save)]
    return max(numbers, default=0) > tracked(storage)


def _reached(storage: Storage) -> int:
    """The last iteration that a run has logged; the file may be written to at the same time."""
    try:
        return len(metrics(storage.run_folder()))
    except (FileNotFoundError, ValueError):
        return 0


def _start_and_kill(
    ranks: ForkedRanks, recipe: Path, job: Job, storage: Storage, log: Path, generator: random.Random
) -> None:
    """Start a job, wait for the moment `job.killed_while`, and kill one of its ranks, or all at once."""
    before = tracked(storage)
    steps = generator.randint(2, 5)
    storage.begin()
    log.write_text("")

    def is_time() -> bool:
        output = log.read_text()
        if job.killed_while == "starting":
            return "starting from" in output or "resuming after" in output
        if "data: " not in output:  # a resumed run first truncates its logs: until then they show the previous run
            return False
        if job.killed_while == "saving":
            return storage.is_saving(before, steps)
        return _reached(storage) >= before + steps

    pids = ranks.start("--config", recipe, *job.flags(storage.save), ranks=job.ranks, log=log)
    started = time.monotonic()
    while not is_time():
        in_time = time.monotonic() - started < TIMEOUT_SECONDS
        assert in_time and not ranks.has_ended(), log.read_text()[-3000:]
        time.sleep(storage.poll_seconds)
    time.sleep(generator.random() * (0.05 if job.killed_while == "saving" else 0.5))
    for pid in pids if job.all_at_once else generator.sample(pids, 1):
        with suppress(ProcessLookupError):  # it has ended because of another one
            os.kill(pid, signal.SIGKILL)
    assert ranks.wait(TIMEOUT_SECONDS) != 0, log.read_text()[-3000:]
    reported = [int(number) for number in re.findall(r"saved .*iter_(\d+)", log.read_text())]
    assert tracked(storage) >= max(reported, default=before), "a checkpoint that was reported is lost"
    found, newest = latest_checkpoint(storage.save), tracked(storage)
    assert found is None or int(found.name[5:12]) >= newest, f"{found} is whole, {newest} is not"


def _finish(ranks: ForkedRanks, recipe: Path, job: Job, storage: Storage, log: Path, last: int) -> None:
    """Start a job that nobody kills; it stops after iteration `last`."""
    storage.begin()
    flags = (*job.flags(storage.save), "--exit-interval", str(last))
    ranks.start("--config", recipe, *flags, ranks=job.ranks, log=log)
    assert ranks.wait(TIMEOUT_SECONDS) == SAVED, log.read_text()[-3000:]


def _uninterrupted(recipe: Path) -> RowLoader:
    read = load_recipe(recipe)
    read.training.global_batch_size = 1
    return build_loader(read, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=False)


def _kill_all(ranks: ForkedRanks, recipe: Path, jobs: list[Job], storage: Storage, generator: random.Random) -> str:
    """Start and kill the jobs, in order. Returns what happened, for the log."""
    unfinished = 0
    for job in jobs:
        _start_and_kill(ranks, recipe, job, storage, recipe.with_name("log"), generator)
        unfinished += job.killed_while == "saving" and is_unfinished(storage)
    assert unfinished or sum(job.killed_while == "saving" for job in jobs) < 4, "no save was interrupted"
    moments = dict(Counter(job.killed_while for job in jobs))
    return f"{len(jobs)} kills ({moments}, {unfinished} left a checkpoint unfinished)"


def resume_in_other_layouts(ranks: ForkedRanks, folder: Path, jobs: list[Job], storage: Storage, seed: int) -> None:
    """The last job is not killed. Rows and samples are those of an uninterrupted run, whatever the layouts."""
    recipe = write_mixed_recipe(folder)
    *killed, last = jobs
    happened = _kill_all(ranks, recipe, killed, storage, random.Random(seed))
    _finish(ranks, recipe, last, storage, folder / "log", tracked(storage) + 6)
    done = read_samples(storage.fetched())
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


def resume_in_the_same_layout(ranks: ForkedRanks, folder: Path, jobs: list[Job], storage: Storage, seed: int) -> None:
    """The run has the metrics of one that nobody killed, bit for bit, and the same samples."""
    recipe = write_mixed_recipe(folder)
    happened = _kill_all(ranks, recipe, jobs, storage, random.Random(seed))
    last, unbroken = tracked(storage) + 4, Disk(folder / "unbroken")
    for one in (storage, unbroken):
        _finish(ranks, recipe, jobs[-1], one, folder / "log", last)
    found, expected = storage.fetched(), unbroken.fetched()
    kept = [[{key: line[key] for key in COMPARED} for line in metrics(path)] for path in (found, expected)]
    assert kept[0] == kept[1] and len(kept[0]) == last
    assert read_samples(found) == read_samples(expected)
    print(f"{happened}: {last} iterations as without")


def same_layout(layout: str, kills: int) -> list[Job]:
    """Jobs of one layout, killed at all kinds of moments."""
    moments = ("saving", "training", "starting", "saving")
    return [Job(2 if layout == "dp2" else 1, 4, 1, layout, moments[n % 4], n % 3 == 2) for n in range(kills)]
