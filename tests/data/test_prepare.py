"""Annotations to shards by the command line: good ones written, bad ones listed, the sum adds up."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.data.shard_reader import ShardFolder
from tests.data.helpers import Folder, mixed_folder

TOOL = Path(__file__).parents[2] / "tools" / "prepare_shards.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_good_and_bad(tmp_path: Path) -> None:
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
    for i in range(0, 300, 37):  # original bytes
        paths = folder.entries[i].get("image", [])
        paths = [paths] if isinstance(paths, str) else paths
        assert shards[i].images == [(folder.images / path).read_bytes() for path in paths]


def run_here(*arguments: object) -> int:
    """Without the cost of another process."""
    spec = importlib.util.spec_from_file_location("prepare_shards_tool", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return int(module.main([str(argument) for argument in arguments]))


def test_nothing_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path)
    folder.add("empty", "hi", "")
    assert run_here("--annotations", folder.write(), "--output", tmp_path / "s") == 1
    assert "no shard was written" in capsys.readouterr().err
    assert not (tmp_path / "s").exists() and not (tmp_path / "s.partial").exists()
    assert "empty answer" in (tmp_path / "s.quarantine.jsonl").read_text()


def test_wrong_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("--annotations", tmp_path / "absent.json", "--output", tmp_path / "s") == 2
    assert "absent.json cannot be read" in capsys.readouterr().err
