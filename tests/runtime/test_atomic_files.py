"""A target is whole or absent, whatever ends the writer: an error, a full disk, SIGKILL."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_vlm.runtime.atomic_files import atomic_file, atomic_folder, is_absent_or_empty


def write_file(target: Path, content: bytes, in_the_middle: Callable[[], object] = lambda: None) -> None:
    with atomic_file(target) as file:
        file.write(content[:1])
        in_the_middle()
        file.write(content[1:])


def write_folder(target: Path, content: bytes, in_the_middle: Callable[[], object] = lambda: None) -> None:
    with atomic_folder(target) as staging_dir:
        (staging_dir / "sub").mkdir()
        (staging_dir / "sub" / "first").write_bytes(content)
        in_the_middle()
        (staging_dir / "second").write_bytes(content)


BOTH = pytest.mark.parametrize("write", [write_file, write_folder])


@BOTH
def test_the_target_appears_at_the_end(tmp_path: Path, write: Callable[..., None]) -> None:
    target = tmp_path / "new" / "target"
    write(target, b"content", lambda: target.exists() and pytest.fail("too early"))
    assert list((tmp_path / "new").iterdir()) == [target]
    files = [target] if target.is_file() else [target / "sub" / "first", target / "second"]
    assert all(file.read_bytes() == b"content" for file in files)


@BOTH
def test_everything_is_synced_before_the_rename(
    tmp_path: Path, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    write(tmp_path / "target", b"content")
    renamed = calls.index("rename")
    assert calls[renamed + 1 :] == [str(tmp_path)]
    written = [os.path.relpath(path, tmp_path).partition("/")[2] for path in calls[:renamed]]
    assert sorted(written) == ([""] if write is write_file else ["", "second", "sub", "sub/first"])


@BOTH
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path: Path, write: Callable[..., None], error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(error):
        write(tmp_path / "target", b"content", fail)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """write() fails beyond `size` bytes, as it does on a full disk: in the middle, and without a file's name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@BOTH
def test_a_full_disk_is_an_error_that_names_the_target(tmp_path: Path, write: Callable[..., None]) -> None:
    with pytest.raises(OSError, match="File too large") as caught, files_of_at_most(10_000):
        write(tmp_path / "target", bytes(100_000))
    assert caught.value.filename == str(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def _kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@BOTH
def test_killed_in_the_middle(tmp_path: Path, write: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=write, args=(tmp_path / "target", b"content", _kill_myself)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".target.")
    write(tmp_path / "target", b"content")
    assert sorted(tmp_path.iterdir()) == [leftover, tmp_path / "target"]
    reported = capsys.readouterr().err
    assert (f"{leftover} was left by a process that was killed" in reported) == leftover.is_dir()


def test_an_existing_file_is_replaced_or_stays_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write_file(target, b"old")
    with pytest.raises(ZeroDivisionError):
        write_file(target, b"new", lambda: 1 / 0)
    assert target.read_bytes() == b"old"
    with target.open("rb") as reader:
        write_file(target, b"new")
        assert reader.read() == b"old"
    assert target.read_bytes() == b"new"


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    assert is_absent_or_empty(target)
    write_folder(target, b"content")
    assert (target / "second").exists() and not is_absent_or_empty(target)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_folder(target, b"other")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_folder(target / "second", b"other")
    assert (target / "second").read_bytes() == b"content" and list(tmp_path.iterdir()) == [target]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    def overtake() -> None:
        write_file(tmp_path / "target", b"second")

    write_file(tmp_path / "target", b"first", overtake)
    assert (tmp_path / "target").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1
