"""Work folders of parts: renamed when complete; removed by the next process if their process was killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.prepare import shard_destination as destination
from megatron_vlm.data.prepare.shard_destination import LocalDestination, _work_folder


def create(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "file").write_text(text)


def test_a_part_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = LocalDestination(tmp_path / "s")
    with target.staging("00000") as folder:
        create(folder, "one")
        assert not (tmp_path / "s.partial" / "00000").exists()
    assert (tmp_path / "s.partial" / "00000" / "file").read_text() == "one"
    with target.staging("00001"):
        pass  # it has no valid sample
    with pytest.raises(RuntimeError), target.staging("00002") as folder:
        create(folder, "half")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "s.partial").iterdir()] == ["00000"]


def test_two_processes_write_the_same_part(tmp_path: Path) -> None:
    first, second = LocalDestination(tmp_path / "s"), LocalDestination(tmp_path / "s")
    with first.staging("00000") as one, second.staging("00000") as other:
        assert one != other
        create(one, "same"), create(other, "same")
    assert (tmp_path / "s.partial" / "00000" / "file").read_text() == "same"
    (tmp_path / "s.partial" / ".work-of-a-killed-process").mkdir()
    first.publish(b"{}")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["00000", "index.json"]
    with pytest.raises(DataError, match="not empty"):
        LocalDestination(tmp_path / "s")


def test_abandoned_work_folders_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(tmp_path / ".work-abandoned", "x")
    with _work_folder(tmp_path, ".work-") as own:
        assert (tmp_path / ".work-abandoned").exists()  # too young: it may not be locked yet
        for folder in (own, tmp_path / ".work-abandoned"):
            os.utime(folder, (0, 0))
        with _work_folder(tmp_path, ".work-"):
            assert own.exists() and not (tmp_path / ".work-abandoned").exists()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(destination.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))
    create(tmp_path / ".work-unknown", "x")
    os.utime(tmp_path / ".work-unknown", (0, 0))
    with _work_folder(tmp_path, ".work-"):
        assert (tmp_path / ".work-unknown").exists()  # it may still be in use
