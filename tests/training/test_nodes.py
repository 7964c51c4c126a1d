"""Two nodes with an agent and two ranks each: one dies and comes back, or not; one has other code, data or time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vlm.runtime.exit_codes import FAILED, FINISHED, SAVED
from tests.support.forked_ranks import ForkedRanks
from tests.support.launch import ROOT
from tests.support.nodes import Node, two_nodes
from tests.training.tiny_run import metrics, write_recipe

PATIENCE = 300
LAST = 80
FLAGS = ("--save-interval", "5", "--exit-interval", str(LAST))
MEETING = "last_call_timeout=2,keep_alive_interval=2,keep_alive_max_attempt=5"
COMPARED = ("iteration", "lm_loss", "grad_norm", "learning_rate", "tokens", "loss_tokens", "tiles", "rows")
EQUAL = 1e-5
pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, and the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("nodes")
    recipe = write_recipe(folder, train_iters=1000, distributed_timeout_minutes=5)
    ranks = ForkedRanks()
    try:
        ranks.start("--config", recipe, "--save", folder / "unbroken", *FLAGS, ranks=4, log=folder / "log")
        assert ranks.wait(PATIENCE) == SAVED, (folder / "log").read_text()[-3000:]
    finally:
        ranks.close()
    return folder


def kept(save: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in COMPARED} for line in metrics(save)]


def reached(save: Path) -> int:
    try:
        return len(metrics(save))
    except (FileNotFoundError, ValueError):
        return 0


def tracked(save: Path) -> int:
    tracker = save / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def wait_for(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-5000:]
        time.sleep(0.02)


def arguments(nodes: str, ranks: int, recipe: Path, save: Path, restarts: int = 5) -> tuple[str, ...]:
    return (
        "--nnodes", nodes, "--nproc-per-node", str(ranks), "--max-restarts", str(restarts),
        "-m", "megatron_vlm.train", "--config", str(recipe), "--save", str(save), *FLAGS,
    )  # fmt: skip


def test_a_node_is_killed_and_replaced(unbroken: Path) -> None:
    """Losses, norms and rows are those of the unbroken run, bit for bit."""
    save, log = unbroken / "replaced", unbroken / "log1"
    command = arguments("2", 2, unbroken / "recipe.yaml", save)
    with two_nodes() as (first, second, head):
        agent = first.start(*command, log=log, head=head, meeting=MEETING)
        second.start(*command, log=log, head=head, meeting=MEETING)
        wait_for(lambda: tracked(save) >= 5 and reached(save) > tracked(save), log)
        second.kill()
        assert tracked(save) < LAST, "it was killed too late"
        other = second.start(*command, log=log, head=head, meeting=MEETING)
        assert agent.wait(timeout=PATIENCE) == SAVED, log.read_text()[-5000:]
        assert other.wait(timeout=PATIENCE) == SAVED
    assert "resuming after iteration" in log.read_text()
    assert kept(save) == kept(unbroken / "unbroken")


def test_a_node_is_lost_and_another_comes_later(unbroken: Path) -> None:
    """Training continues with half of the ranks, then with all; losses differ by rounding alone."""
    save, log = unbroken / "fewer", unbroken / "log2"
    command = arguments("1:2", 2, unbroken / "recipe.yaml", save)
    with two_nodes() as (first, second, head):
        agent = first.start(*command, log=log, head=head, meeting=MEETING)
        second.start(*command, log=log, head=head, meeting=MEETING)
        wait_for(lambda: tracked(save) >= 5 and "4 ranks: data 4" in log.read_text(), log)
        second.kill()
        wait_for(lambda: "2 ranks: data 2" in log.read_text().rpartition("4 ranks: data 4")[2], log)
        other = second.start(*command, log=log, head=head, meeting=MEETING)
        assert agent.wait(timeout=PATIENCE) == SAVED, log.read_text()[-5000:]
        other.wait(timeout=PATIENCE)
    for line, expected in zip(kept(save), kept(unbroken / "unbroken"), strict=True):
        for key in COMPARED:
            assert line[key] == pytest.approx(expected[key], rel=EQUAL), (line["iteration"], key)


def _start_both(folder: Path, recipe: Path, change: Callable[[Path], None]) -> str:
    """Each node has its own working folder, with data and code; `change` is done to that of the second."""
    log = folder / "log"
    command = arguments("2", 1, recipe, folder / "run", restarts=0)

    def start(node: Node, name: str, head: str) -> Any:
        directory = folder / name
        shutil.copytree(folder / "data", directory / "data")
        shutil.copytree(ROOT / "megatron_vlm", directory / "megatron_vlm")
        if name == "second":
            change(directory)
        return node.start(*command, log=log, head=head, meeting=MEETING, cwd=directory)

    with two_nodes() as (first, second, head):
        agents = [start(first, "first", head), start(second, "second", head)]
        assert {agent.wait(timeout=PATIENCE) for agent in agents} == {FAILED}, log.read_text()[-5000:]
    return log.read_text()


def _other_code(directory: Path) -> None:
    with (directory / "megatron_vlm" / "train.py").open("a") as file:
        file.write("# an older version\n")


def _other_data(directory: Path) -> None:
    (annotations,) = (directory / "data").glob("*.json")
    annotations.write_text(annotations.read_text().replace("?", "!", 1))


@pytest.mark.parametrize(
    ("change", "named"), [(_other_code, "megatron-vlm is "), (_other_data, "the content of data/")]
)
def test_a_node_with_other_code_or_data_is_named(tmp_path: Path, change: Callable[[Path], None], named: str) -> None:
    recipe = write_recipe(tmp_path)
    settings = yaml.safe_load(recipe.read_text())
    (annotations,) = settings["data"]["data_path"]
    settings["data"] |= {"data_path": [f"data/{Path(annotations).name}"], "image_folder": "data/images"}
    recipe.write_text(yaml.safe_dump(settings))
    output = _start_both(tmp_path, recipe, change)
    assert f"ranks of this job do not start from the same: {named}" in output and " on rank 1 (" in output


ENTRY = '''
"""A rank of a node with this name, whose clock is so many seconds ahead."""
import socket
import sys
import time

from megatron_vlm import train

true_time = time.time

if __name__ == "__main__":
    time.time = lambda: true_time() + {ahead}
    socket.gethostname = lambda: "{name}"
    sys.exit(train.main())
'''


def test_a_node_whose_clock_is_wrong_is_named(tmp_path: Path) -> None:
    """In a warning, because nothing of training depends on it."""
    recipe, log = write_recipe(tmp_path), tmp_path / "log"
    command = (
        "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "0", "-m", "rank_of_this_node",
        "--config", str(recipe), "--save", str(tmp_path / "run"), "--train-iters", "1",
    )  # fmt: skip
    with two_nodes() as (first, second, head):
        agents = []
        for node, name, ahead in ((first, "first", 0), (second, "second", -3600)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "rank_of_this_node.py").write_text(ENTRY.format(ahead=ahead, name=name))
            agents.append(node.start(*command, log=log, head=head, meeting=MEETING, cwd=tmp_path / name))
        assert {agent.wait(timeout=PATIENCE) for agent in agents} == {FINISHED}, log.read_text()[-5000:]
    assert "WARNING: the clock of first is 3600 s ahead of that of second" in log.read_text()
