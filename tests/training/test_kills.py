"""A job that is killed again and again, saving to a disk or to an object store; kills.py says what must hold."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.forked_ranks import ForkedRanks
from tests.support.s3_server import BUCKET, Proxy, store
from tests.training.kills import Disk, Job, Store, resume_in_other_layouts, resume_in_the_same_layout, same_layout

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


@pytest.fixture(scope="module")
def ranks() -> Iterator[ForkedRanks]:
    forked = ForkedRanks()
    yield forked
    forked.close()


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with store() as running:
        yield running


@pytest.fixture
def in_store(
    request: pytest.FixtureRequest, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ForkedRanks, Store]]:
    """Ranks that find the store, and a prefix in it."""
    node = tmp_path / "node"
    node.mkdir()
    monkeypatch.setenv("TMPDIR", str(node))
    monkeypatch.setattr(tempfile, "tempdir", str(node))
    forked = ForkedRanks()
    yield forked, Store(f"s3://{BUCKET}/{request.node.name.partition('[')[0]}", node, proxy)
    forked.close()


@pytest.mark.timeout(1800)
def test_three_kills(ranks: ForkedRanks, tmp_path: Path) -> None:
    resume_in_the_same_layout(ranks, tmp_path, same_layout("dp2", 3), Disk(tmp_path / "run"), seed=0)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_two_kills_and_other_layouts(ranks: ForkedRanks, tmp_path: Path) -> None:
    resume_in_other_layouts(ranks, tmp_path, TWO, Disk(tmp_path / "run"), seed=0)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("layout", "kills"), [("dp2", 14), ("pp2", 8), ("tp2", 8)])
def test_thirty_kills(ranks: ForkedRanks, tmp_path: Path, layout: str, kills: int) -> None:
    resume_in_the_same_layout(ranks, tmp_path, same_layout(layout, kills), Disk(tmp_path / "run"), seed=1)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_twenty_kills_and_other_layouts(ranks: ForkedRanks, tmp_path: Path) -> None:
    resume_in_other_layouts(ranks, tmp_path, [*TEN[:-1], *TEN], Disk(tmp_path / "run"), seed=1)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_twelve_kills_in_an_object_store(in_store: tuple[ForkedRanks, Store], tmp_path: Path) -> None:
    ranks, storage = in_store
    resume_in_the_same_layout(ranks, tmp_path, same_layout("dp2", 12), storage, seed=2)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_ten_kills_in_an_object_store_and_other_layouts(in_store: tuple[ForkedRanks, Store], tmp_path: Path) -> None:
    ranks, storage = in_store
    resume_in_other_layouts(ranks, tmp_path, TEN, storage, seed=2)
