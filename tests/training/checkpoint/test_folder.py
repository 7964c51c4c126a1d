"""Which checkpoint a run resumes from, whatever a killed run left."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlm.training.checkpoint.errors import CheckpointError
from megatron_vlm.training.checkpoint.folder import (
    RECIPE,
    TRACKER,
    checkpoint_path,
    latest_checkpoint,
    publish,
    recover,
    remove_old,
    whole_checkpoints,
)
from megatron_vlm.training.checkpoint.trusted_metadata import METADATA


def make(folder: Path, iteration: int, content: str = "{}", suffix: str = "") -> Path:
    """A folder that looks like a whole checkpoint."""
    path = checkpoint_path(folder, iteration)
    path = path.with_name(path.name + suffix)
    path.mkdir(parents=True)
    (path / METADATA).write_bytes(b"")
    (path / RECIPE).write_text(content)
    return path


def iterations(folder: Path) -> list[int]:
    return [iteration for iteration, _ in whole_checkpoints(folder)]


def test_nothing_was_ever_saved(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("tracker", [None, "", "\n", "ten", "30", "\x00\x00"])
def test_newest_whole_one_without_a_usable_tracker(tmp_path: Path, tracker: str | None) -> None:
    """Missing, empty, torn, or naming a checkpoint that is not whole."""
    make(tmp_path, 10)
    newest = make(tmp_path, 20)
    (make(tmp_path, 30) / RECIPE).unlink()
    make(tmp_path, 40, suffix=".incomplete")
    if tracker is not None:
        (tmp_path / TRACKER).write_text(tracker)
    assert latest_checkpoint(tmp_path) == newest


def test_tracker_goes_back(tmp_path: Path) -> None:
    older = make(tmp_path, 10)
    make(tmp_path, 20)
    (tmp_path / TRACKER).write_text("10\n")
    assert latest_checkpoint(tmp_path) == older


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    (make(tmp_path, 10) / METADATA).unlink()
    (tmp_path / TRACKER).write_text("10")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole: restore iter_0000010"):
        latest_checkpoint(tmp_path)


def test_publish_replaces_the_same_iteration(tmp_path: Path) -> None:
    make(tmp_path, 10, "old")
    target = publish(make(tmp_path, 10, "new", ".incomplete"), 10)
    assert target == tmp_path / "iter_0000010" and (target / RECIPE).read_text() == "new"
    assert (tmp_path / TRACKER).read_text() == "10" and len(list(tmp_path.iterdir())) == 2


def test_a_whole_one_is_there_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between any two steps of replacing the only checkpoint, one of the two is found afterwards."""
    real = Path.rename
    for kill_at in range(3):
        folder = tmp_path / str(kill_at)
        make(folder, 10, "old")
        incomplete = make(folder, 10, "new", ".incomplete")
        count = iter(range(10))

        def rename(self: Path, target: Path, kill_at: int = kill_at, count: object = count) -> Path:
            if next(count) == kill_at:  # type: ignore[call-overload]
                raise KeyboardInterrupt
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        if kill_at < 2:
            with pytest.raises(KeyboardInterrupt):
                publish(incomplete, 10)
        else:
            publish(incomplete, 10)
        monkeypatch.setattr(Path, "rename", real)
        recover(folder)
        found = latest_checkpoint(folder)
        assert found is not None and (found / RECIPE).read_text() == ("new" if kill_at == 2 else "old")


def test_copies_from_an_object_store_are_replaced_and_removed(tmp_path: Path) -> None:
    make(tmp_path, 10, "older")
    make(tmp_path, 10, "saved again", ".2")
    make(tmp_path, 20, suffix=".3")
    found = latest_checkpoint(tmp_path)
    assert found == tmp_path / "iter_0000020.3" and dict(whole_checkpoints(tmp_path))[10].name == "iter_0000010.2"
    publish(make(tmp_path, 20, "new", ".incomplete"), 20)
    assert sorted(path.name for path in tmp_path.glob("iter_*20*")) == ["iter_0000020"]
    assert [path.name for path in remove_old(tmp_path, 1, None)] == ["iter_0000010", "iter_0000010.2"]
    assert iterations(tmp_path) == [20]


def test_recover_removes_what_was_being_removed(tmp_path: Path) -> None:
    make(tmp_path, 10, suffix=".removed")
    make(tmp_path, 20)
    make(tmp_path, 20, suffix=".replaced")
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000020"]


def test_old_ones_are_removed(tmp_path: Path) -> None:
    for iteration in range(5, 45, 5):
        make(tmp_path, iteration)
    (tmp_path / TRACKER).write_text("15")
    assert remove_old(tmp_path, None, None) == []
    removed = remove_old(tmp_path, 2, 20)
    assert [path.name for path in removed] == [f"iter_{i:07d}" for i in (5, 10, 25, 30)]
    assert iterations(tmp_path) == [15, 20, 35, 40], "the tracker's, every 20th, and the newest two"
