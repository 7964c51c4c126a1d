"""A rank that starts from something else than the others is named, with what differs, within a minute."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_vlm.runtime.agreement import clock_differences
from tests.data.helpers import tiny_tokenizer_folder
from tests.support.forked_ranks import launch_forked
from tests.training.run_agreement import CASES, ODD_RANK, SHORT
from tests.training.tiny_run import write_recipe

EXPECTED = {
    "other_recipe": "training.seed is 43 on rank 2",
    "other_layout": "parallel.tensor_model_parallel_size is 2 on rank 2",
    "other_code": "megatron-vlm is 0.1.0 (source older) on rank 2",
    "other_data": "the content of",
    "other_tokenizer": "the tokenizer is",
    "other_iteration": "the iteration to resume after is 8 on rank 2",
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    folder = tmp_path_factory.mktemp("agreement")
    write_recipe(folder)
    for file in tiny_tokenizer_folder(folder / "other_tokenizer").iterdir():
        file.write_text(file.read_text().replace("<|padding|>", "<|filler|>"))
    done = launch_forked("-m", "tests.training.run_agreement", folder, ranks=4, timeout=240)
    return json.loads((folder / "results.json").read_text()), done.stdout


def test_all_cases_are_looked_at() -> None:
    assert set(EXPECTED) == set(CASES) - {"nothing", "clocks"}


@pytest.mark.parametrize("case", EXPECTED)
def test_every_rank_says_which_one_differs_and_in_what(output: tuple[list[dict[str, Any]], str], case: str) -> None:
    results, _ = output
    for rank in results:
        message = rank[case]["message"]
        assert EXPECTED[case] in message and f"on rank {ODD_RANK} (" in message, message
        assert rank[case]["seconds"] < 60


def test_equal_ranks_agree_and_caches_may_differ(output: tuple[list[dict[str, Any]], str]) -> None:
    results, text = output
    assert [rank["nothing"]["message"] for rank in results] == [""] * 4
    assert [rank["clocks"]["message"] for rank in results] == [""] * 4
    assert "600 s behind" in text


def test_which_clock_is_wrong() -> None:
    def named(*clocks: float) -> list[str]:
        return clock_differences([(f"node{number}", clock) for number, clock in enumerate(clocks)])

    assert named(100) == named(100, 159) == named(100, 130, 159) == []
    assert named(100, 100, 4000) == ["node2 is 3900 s ahead"]
    assert named(100, 4000, 4000) == ["node0 is 3900 s behind"]
    assert named(100, 100, 100, 0, 4000) == ["node3 is 100 s behind", "node4 is 3900 s ahead"]
    assert named(100, 4000) == ["node1 is 3900 s ahead of that of node0"]
    assert named(4000, 4000, 100, 100) == ["node0 is 3900 s ahead of that of node2"]


def test_measuring_may_take_longer_than_a_collective_of_training(
    output: tuple[list[dict[str, Any]], str],
) -> None:
    results, _ = output
    assert all(rank["slow_measuring"] > 60 * SHORT for rank in results)
