"""tools/prepare_shards.py: valid samples are written, invalid ones are listed, and an interrupted run is resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vlm.commands import prepare_shards
from megatron_vlm.data.length_index import load_length_index
from megatron_vlm.data.prepare import shard_writer
from megatron_vlm.data.prepare.annotation_finder import find_annotations
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.data.shards.mds_format import ShardSample
from megatron_vlm.data.shards.reader import ShardFolder
from megatron_vlm.data.sources.sample_source import AnnotationSource
from tests.data.helpers import Folder, mixed_folder, tiny_model, tiny_tokenizer_folder

TOOL = Path(__file__).parents[3] / "tools" / "prepare_shards.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_valid_and_invalid_samples(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, 300)
    folder.add("gone", "<image> hi", "yes", image="gone.png")
    folder.add("broken", "<image> hi", "yes", image=folder.image("broken.png", 9, 9))
    (folder.images / "broken.png").write_bytes((folder.images / "broken.png").read_bytes()[:100])
    folder.add("empty", "hi", "")
    result = run("--annotations", folder.write(), "--image-folder", folder.images, "--output", tmp_path / "s",
                 "--processes", 2, "--size-limit", 50000)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "303 samples read = 300 written with 300 images + 3 quarantined" in result.stdout
    assert "WARNING: 3 samples are NOT in the shards" in result.stderr
    listed = [json.loads(line) for line in (tmp_path / "s" / "quarantine.jsonl").read_text().splitlines()]
    assert [(item["id"], item["reason"]) for item in listed] == [
        ("gone", "missing image"),
        ("broken", "unreadable image"),
        ("empty", "empty answer"),
    ]
    shards = ShardFolder(tmp_path / "s")
    assert [shards[i].annotation for i in range(300)] == folder.entries[:300]
    for i in range(0, 300, 37):  # image bytes are unchanged
        paths = folder.entries[i].get("image", [])
        paths = [paths] if isinstance(paths, str) else paths
        assert shards[i].images == [(folder.images / path).read_bytes() for path in paths]


def run_here(*arguments: object) -> int:
    """In this process, which is faster."""
    return int(prepare_shards.main([str(argument) for argument in arguments]))


def test_no_valid_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path)
    folder.add("empty", "hi", "")
    assert run_here("--annotations", folder.write(), "--output", tmp_path / "s") == 1
    assert "no shard was written" in capsys.readouterr().err
    assert not (tmp_path / "s").exists() and not (tmp_path / "s.partial").exists()
    assert "empty answer" in (tmp_path / "s.quarantine.jsonl").read_text()


def test_missing_annotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("--annotations", tmp_path / "absent.json", "--output", tmp_path / "s") == 2
    assert "absent.json cannot be read" in capsys.readouterr().err


def test_a_folder_of_annotations_and_resuming_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mixed_folder(tmp_path / "in", 30)
    (folder.root / "notes").mkdir()
    folder.write("notes/a.json"), folder.write("notes/b.jsonl")
    loaded = []
    load = shard_writer._load

    def load_until_interrupted(source: AnnotationSource, index: int) -> ShardSample:
        loaded.append((source.name, index))
        if len(loaded) == 35:
            raise KeyboardInterrupt
        return load(source, index)

    monkeypatch.setattr(shard_writer, "_load", load_until_interrupted)
    arguments = ("--annotations", folder.root / "notes", "--image-folder", folder.images, "--output", tmp_path / "s",
                 "--processes", 1, "--samples-per-part", 10)  # fmt: skip
    assert run_here(*arguments) == 130 and "run the same command to resume" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    assert run_here(*arguments[:-1], 20) == 2 and "other parts, samples_per_part" in capsys.readouterr().err
    assert run_here(*arguments) == 0
    assert "60 samples read = 60 written" in capsys.readouterr().out
    assert len(loaded) == 35 + 30  # three parts of ten were complete; the other three are written again
    shards = ShardFolder(tmp_path / "s")
    assert [shards[i].annotation for i in range(60)] == folder.entries * 2
    assert run_here(*arguments) == 2 and "not empty" in capsys.readouterr().err


def test_a_folder_with_other_json_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Length indexes, lists of rejected samples, shard indexes and metadata of images are no annotations."""
    folder = mixed_folder(tmp_path / "data", 8)
    folder.add("empty", "hi", "")
    path = folder.write("a.json")
    tokenizer = load_tokenizer(tiny_tokenizer_folder(tmp_path / "tokenizer"))
    load_length_index(AnnotationSource(path, folder.images), tokenizer, ImageGeometry.of(tiny_model(), "anyres"))
    assert list((folder.root / ".lengths").glob("*.jsonl"))
    (folder.root / "a.jsonl.quarantine.jsonl").write_text('{"reason": "x", "conversations": []}\n')
    (folder.images / "0.json").write_text('{"width": 3, "conversations": 1}')
    (folder.images / "all.json").write_text('[{"file": "0_0.png"}]')
    (folder.images / "index.json").write_text('{"version": 2, "shards": []}')
    arguments = ("--annotations", folder.root, "--image-folder", folder.images, "--processes", 1)
    assert run_here(*arguments, "--output", tmp_path / "s") == 0
    assert "9 samples read = 8 written" in capsys.readouterr().out
    assert [file.name for file in find_annotations([folder.root])] == ["a.json"]
    (folder.root / "b.jsonl").write_text('{"id": \n')  # damaged: said, not left out
    assert [file.name for file in find_annotations([folder.root])] == ["a.json", "b.jsonl"]
    assert run_here("--annotations", folder.images, "--output", tmp_path / "t") == 2
    assert "no file with conversations (.json, " in capsys.readouterr().err


def test_the_output_may_be_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mixed_folder(tmp_path / "data", 4)
    arguments = ("--annotations", folder.write(), "--image-folder", folder.images, "--processes", 1, "--output", ".")
    monkeypatch.chdir(tmp_path)
    assert run_here(*arguments) == 2 and "not empty" in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    assert run_here(*arguments) == 0
    assert len(ShardFolder(tmp_path / "new")) == 4 and sorted(tmp_path.iterdir()) == [
        tmp_path / "data",
        tmp_path / "new",
    ]


def test_too_many_rejected_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path)
    for name, answer in (("a", ""), ("b", "")):
        folder.add(name, "hi", answer)
    arguments = ("--annotations", tmp_path / "train.json", "--output", tmp_path / "s", "--processes", 1)
    folder.write()
    assert run_here(*arguments) == 1 and (tmp_path / "s.quarantine.jsonl").exists()
    folder.add("c", "hi", "yes")
    folder.write()
    capsys.readouterr()
    assert run_here(*arguments) == 1
    assert "2 of 3 samples were rejected, more than --max-rejected 50%" in capsys.readouterr().err
    assert len(ShardFolder(tmp_path / "s")) == 1 and not (tmp_path / "s.quarantine.jsonl").exists()
    assert run_here(*arguments[:-4], "--output", tmp_path / "t", "--max-rejected", 2) == 0


def test_resuming_after_a_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path)
    large = folder.image("large.png", 900, 900)
    for i in range(60):
        folder.add(f"s{i}", "<image> hi", f"yes {i}", image=large)
    out, records = tmp_path / "s", tmp_path / "s.partial" / "parts"
    arguments = ["--annotations", folder.write(), "--image-folder", folder.images, "--output", out,
                 "--processes", 2, "--samples-per-part", 1]  # fmt: skip
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(TOOL.parents[1])}) as process:
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(list(records.glob("0*"))) < 5:
            assert process.poll() is None
            time.sleep(0.005)
        forked = [Path("/proc", pid) for pid in workers.read_text().split()]
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(path.exists() and "\nState:\tZ" not in (path / "status").read_text() for path in forked):
        assert time.monotonic() < deadline, "the forked processes are still running"
        time.sleep(0.01)
    before = {path.name: path.stat().st_mtime_ns for path in records.glob("0*")}
    assert len(forked) == 2 and 5 <= len(before) < 60 and not out.exists()
    assert run_here(*arguments) == 0
    assert "60 samples read = 60 written with 60 images + 0 quarantined" in capsys.readouterr().out
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in (out / "parts").glob("0*")}.items()
    assert not list(out.glob(".*")) and not (tmp_path / "s.partial").exists()  # nothing of the killed run is left
    shards = ShardFolder(out)
    assert [shards[i].annotation for i in range(60)] == folder.entries


def test_several_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = mixed_folder(tmp_path, 25)
    folder.add("empty", "hi", "")
    arguments = ("--annotations", folder.write(), "--image-folder", folder.images, "--output", tmp_path / "s",
                 "--processes", 1, "--samples-per-part", 4)  # fmt: skip
    for job in (3, 1):
        assert run_here(*arguments, "--job", f"{job}/3") == 0
    assert run_here("--output", tmp_path / "s", "--merge") == 2
    assert "2 of 7 parts" in capsys.readouterr().err
    assert run_here(*arguments, "--part", "2/3") == 0  # the older name of --job
    assert run_here("--output", tmp_path / "s", "--merge") == 0
    printed = capsys.readouterr()
    assert "26 samples read = 25 written" in printed.out and "empty answer" in printed.err
    assert len(ShardFolder(tmp_path / "s")) == 25
    with pytest.raises(SystemExit):
        run_here(*arguments, "--job", "4/3")


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, 12)
    for name, processes in (("a", 1), ("b", 2)):
        shard_writer.prepare_shards([folder.write()], folder.images, tmp_path / name, processes, samples_per_part=5)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 6 and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
