"""Work folders of parts: put in place whole, removed by whoever comes next if their process was killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.prepare import shard_destination as destination
from megatron_vlm.data.prepare.shard_destination import LocalDestination, _work_folder


def make(place: Path, text: str) -> None:
    place.mkdir()
    (place / "file").write_text(text)


def test_a_part_is_in_its_place_at_the_end(tmp_path: Path) -> None:
    target = LocalDestination(tmp_path / "s")
    with target.staging("00000") as place:
        make(place, "one")
        assert not (tmp_path / "s.partial" / "00000").exists()
    assert (tmp_path / "s.partial" / "00000" / "file").read_text() == "one"
    with target.staging("00001"):
        pass  # no sample of it is good
    with pytest.raises(RuntimeError), target.staging("00002") as place:
        make(place, "half")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "s.partial").iterdir()] == ["00000"]


def test_two_that_make_the_same_part(tmp_path: Path) -> None:
    first, second = LocalDestination(tmp_path / "s"), LocalDestination(tmp_path / "s")
    with first.staging("00000") as one, second.staging("00000") as other:
        assert one != other
        make(one, "same"), make(other, "same")
    assert (tmp_path / "s.partial" / "00000" / "file").read_text() == "same"
    (tmp_path / "s.partial" / ".work-of-one-that-was-killed").mkdir()
    first.publish(b"{}")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["00000", "index.json"]
    with pytest.raises(DataError, match="not empty"):
        LocalDestination(tmp_path / "s")


def test_abandoned_work_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / ".work-abandoned", "x")
    with _work_folder(tmp_path, ".work-") as held:
        assert (tmp_path / ".work-abandoned").exists()  # too young: it might not be locked yet
        for folder in (held, tmp_path / ".work-abandoned"):
            os.utime(folder, (0, 0))
        with _work_folder(tmp_path, ".work-"):
            assert held.exists() and not (tmp_path / ".work-abandoned").exists()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(destination.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))
    make(tmp_path / ".work-whose", "x")
    os.utime(tmp_path / ".work-whose", (0, 0))
    with _work_folder(tmp_path, ".work-"):
        assert (tmp_path / ".work-whose").exists()  # it cannot be known whether it is still used
