"""Forked ranks have what ranks that are started afresh have: arguments, environment, output, exit code, an end."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked_ranks import launch_forked
from tests.support.launch import launch

SCRIPT = r"""
import json, os, sys, tempfile, time
import torch.distributed as dist
from megatron_vlm.runtime.launch import process_group

rank = os.environ.get("RANK", "0")
environment = [os.environ[name] for name in ("FOR_RANKS", "OMP_NUM_THREADS")]

def found(value):  # a line in one write: with PYTHONUNBUFFERED `print` writes its parts, which ranks would mix
    sys.stdout.write(f"found {json.dumps(value)}\n")

found([rank, __name__, sys.argv, sys.path[0], tempfile.gettempdir(), *environment])
with process_group(timeout_minutes=1):
    found(dist.get_world_size())
if sys.argv[1] == "fails" and rank == "1":
    raise ValueError("rank 1 is wrong")
if sys.argv[1] == "exits":
    sys.exit(3)
if sys.argv[1] in ("fails", "hangs"):
    sys.stdout.flush()
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forked") / "script.py"
    path.write_text(SCRIPT)
    return path


def _lines(done: subprocess.CompletedProcess[str]) -> list[Any]:
    found = (line.removeprefix("found ") for line in done.stdout.splitlines() if line.startswith("found "))
    return sorted(map(json.loads, found), key=str)


@pytest.mark.parametrize(("ranks", "name"), [(1, "one"), (2, "two")])
def test_they_see_what_fresh_ranks_see(
    script: Path, tmp_path: Path, ranks: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOR_RANKS", name)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command: tuple[str | Path, ...] = (script, "ends", name)
    forked = _lines(launch_forked(*command, ranks=ranks, timeout=60))
    assert forked == _lines(launch(*command, ranks=ranks, timeout=60))
    assert forked.count(ranks) == ranks


def test_failures(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOR_RANKS", "")
    with pytest.raises(AssertionError, match="(?s)fails on 2 ranks failed:.*ValueError: rank 1 is wrong"):
        launch_forked(script, "fails", ranks=2, timeout=60)
    assert launch_forked(script, "exits", ranks=2, timeout=60, check=False).returncode == 3
    with pytest.raises(subprocess.TimeoutExpired):
        launch_forked(script, "hangs", ranks=2, timeout=0.5)
    assert launch_forked("-m", "json.tool", "--help", ranks=1, timeout=60).stdout.startswith("usage")
