"""A plan is computed once, by one process, and the next one ahead; without a writable folder, by every process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data.packing.epoch_plan import EpochPlan
from megatron_vlm.data.packing.plan_cache import PlanCache


class Planner:
    """Computes plans of `epoch` + 2 rows, and logs each computation as a line of a file."""

    def __init__(self, log: Path, seconds: float = 0.0) -> None:
        self.log, self.seconds = log, seconds

    def __call__(self, epoch: int) -> EpochPlan:
        with self.log.open("a") as file:
            file.write(f"{epoch} {os.getpid()}\n")
        time.sleep(self.seconds)
        return EpochPlan(np.arange(epoch + 3), np.arange(epoch + 2) * 10, 0.5)

    @property
    def computed(self) -> list[int]:
        """The epochs whose plans were computed."""
        return [int(line.split()[0]) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    return Planner(tmp_path / "log")


def test_computed_once_and_memory_mapped(tmp_path: Path, planner: Planner) -> None:
    for _ in range(3):
        plan = PlanCache(tmp_path / "cache", "k", planner)(2)
        assert plan.row(3).tolist() == [30] and plan.rows == 4 and plan.packing_efficiency == 0.5
        assert isinstance(plan.members.base, np.memmap)
    assert planner.computed == [2]
    PlanCache(tmp_path / "cache", "another", planner)(2)
    assert planner.computed == [2, 2]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_damaged_plan_is_computed_again(tmp_path: Path, planner: Planner) -> None:
    cache = PlanCache(tmp_path, "k", planner)
    cache(0)
    (tmp_path / "plan-k-0.arrays").write_bytes(b"nonsense")
    assert cache(0).rows == 2 and planner.computed == [0, 0]


def test_a_folder_that_cannot_be_written(tmp_path: Path, planner: Planner) -> None:
    (tmp_path / "file").write_text("")
    cache = PlanCache(tmp_path / "file", "k", planner)
    assert cache(1).rows == 3 and cache(1).rows == 3 and planner.computed == [1, 1]


def test_one_of_several_processes_computes_the_plan(tmp_path: Path) -> None:
    planner = Planner(tmp_path / "log", seconds=0.3)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=PlanCache(tmp_path, "k", planner), args=(5,)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert planner.computed == [5]


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    slow = Planner(tmp_path / "log", seconds=60)
    rank = multiprocessing.get_context("fork").Process(target=PlanCache(tmp_path, "k", slow), args=(0,))
    rank.start()
    while not slow.computed:
        time.sleep(0.01)
    assert rank.pid is not None
    os.kill(rank.pid, signal.SIGKILL)
    rank.join()
    assert PlanCache(tmp_path, "k", Planner(tmp_path / "log"))(0).rows == 2


def test_the_next_plan_is_computed_ahead(tmp_path: Path, planner: Planner) -> None:
    cache = PlanCache(tmp_path, "k", planner)
    cache.plan_ahead()
    cache(0)
    deadline = time.monotonic() + 20
    while not (tmp_path / "plan-k-1.arrays").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert planner.computed == [0, 1]
    pids = {line.split()[1] for line in planner.log.read_text().splitlines()}
    assert len(pids) == 2
    assert cache(1).rows == 3 and planner.computed[:2] == [0, 1]
    helper = int((pids - {str(os.getpid())}).pop())
    del cache  # the helper process ends with the cache
    while Path(f"/proc/{helper}").exists() and time.monotonic() < deadline:
        multiprocessing.active_children()
        time.sleep(0.01)
    assert not Path(f"/proc/{helper}").exists()
