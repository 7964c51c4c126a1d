"""Agents of one and of two nodes: which exit codes they restart ranks after, and what they do when a node leaves or
comes. The ranks here only start and end; `tests/training/test_nodes.py` trains.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vlm.runtime.exit_codes import FAILED, FINISHED, SAVED, WRONG_SETTINGS
from tests.support.nodes import Node, two_nodes

RANK = "tests.run_light_rank"
PATIENCE = 200
"""Seconds for a step that takes a few, on a machine that is busy."""
pytestmark = pytest.mark.timeout(900)


def wait_for(condition: Callable[[], bool], *logs: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "\n".join(log.read_text()[-3000:] for log in logs)
        time.sleep(0.02)


def starts(folder: Path) -> list[str]:
    path = folder / "starts"
    return path.read_text().splitlines() if path.exists() else []


def test_ranks_are_restarted_after_a_failure_and_after_nothing_else(tmp_path: Path) -> None:
    cases = {
        "finishes": ([FAILED, 139, FINISHED], FINISHED, 3),
        "saved": ([FAILED, SAVED, FINISHED], SAVED, 2),
        "wrong": ([WRONG_SETTINGS, FINISHED], WRONG_SETTINGS, 1),
        "fails": ([FAILED] * 4, FAILED, 3),
    }
    node, agents = Node("127.0.0.1"), {}
    for number, (name, (codes, _, _)) in enumerate(cases.items()):
        (tmp_path / name).mkdir()
        (tmp_path / name / "codes").write_text(json.dumps(codes))
        command = ("--max-restarts", "2", "-m", RANK, str(tmp_path / name))
        agents[name] = node.start(*command, log=tmp_path / f"log{name}", head=f"127.0.0.1:{29621 + number}")
    try:
        for name, (_, code, started) in cases.items():
            assert agents[name].wait(timeout=PATIENCE) == code, (tmp_path / f"log{name}").read_text()
            assert len(starts(tmp_path / name)) == started, name
    finally:
        node.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "codes").write_text("[]")
    return tmp_path


@pytest.mark.full
def test_a_node_joins_leaves_and_is_replaced(folder: Path) -> None:
    """One node trains alone; with a second, both save and start again together; the second dies, and comes back."""
    first_log, second_log = folder / "log1", folder / "log2"
    meeting = "last_call_timeout=2,keep_alive_interval=2,keep_alive_max_attempt=5"
    command = ("--nnodes", "1:2", "--max-restarts", "3", "-m", RANK, str(folder))
    with two_nodes() as (first, second, head):
        agent = first.start(*command, log=first_log, head=head, meeting=meeting)
        wait_for(lambda: starts(folder)[-1:] == ["0 of 1"], first_log)
        second.start(*command, log=second_log, head=head, meeting=meeting)
        wait_for(lambda: sorted(starts(folder)[-2:]) == ["0 of 2", "1 of 2"], first_log, second_log)
        second.kill()
        (folder / "fail").touch()  # as a collective does
        wait_for(lambda: starts(folder)[-1] == "0 of 1", first_log)
        last = second.start(*command, log=second_log, head=head, meeting=meeting)
        wait_for(lambda: sorted(starts(folder)[-2:]) == ["0 of 2", "1 of 2"], first_log, second_log)
        (folder / "finish").touch()
        assert agent.wait(timeout=PATIENCE) == FINISHED and last.wait(timeout=PATIENCE) == FINISHED


@pytest.mark.full
def test_nodes_that_do_not_meet_are_reported(folder: Path) -> None:
    log = folder / "log"
    node = Node("127.0.0.1")
    agent = node.start(
        "--nnodes", "2", "-m", RANK, str(folder), log=log, head="127.0.0.1:29631", meeting="join_timeout=1"
    )
    try:
        assert agent.wait(timeout=PATIENCE) == FAILED
    finally:
        node.kill()
    text = log.read_text()
    assert "the nodes of this job did not meet at 127.0.0.1:29631" in text and "Traceback" not in text
