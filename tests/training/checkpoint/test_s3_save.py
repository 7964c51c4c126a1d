"""Saving to an object store and loading from it on two ranks; the cases are in run_s3.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked_ranks import launch_forked
from tests.support.s3_server import Fault, store

RANK1 = "__1_0.distcp"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each rank."""
    path: Path = tmp_path_factory.mktemp("s3") / "results.json"
    with store() as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
        proxy.faults.append(Fault("error", f"run/iter_0000002/{RANK1}.*partNumber=2$", method="PUT"))
        launch_forked("-m", "tests.training.checkpoint.run_s3", path, ranks=2, timeout=240)
        found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_loads_in_another_layout(results: list[dict[str, Any]]) -> None:
    for found in (result["another_layout"] for result in results):
        assert abs(found["loss"]) < 1e-6
        names = [".metadata", "__0_0.distcp", RANK1, "common.pt", "metadata.json", "recipe.json"]
        assert found["files"] == [*(f"iter_0000001/{name}" for name in names), "latest_checkpointed_iteration.txt"]


def test_a_rank_reads_its_own_ranges(results: list[dict[str, Any]]) -> None:
    """In the layout that wrote it: all weights, and half of the optimizer state, which is three times as large."""
    shares = [sum(result["network_down_in_mid_save"]["requested"].values()) for result in results]
    written = results[0]["another_layout"]["written"]
    assert all(0.55 < share / written < 0.7 for share in shares), (shares, written)


def test_network_down_in_mid_save(results: list[dict[str, Any]]) -> None:
    found = results[0]["network_down_in_mid_save"]
    expected = (
        "the checkpoint of iteration 2 could not be written: rank 1: cannot write part 2 of "
        f"s3://data/run/iter_0000002/{RANK1}, tried 2 times"
    )
    assert all(message.startswith(expected) for message in found["messages"]), found["messages"]
    assert all("Older checkpoints in training.save, s3://data/run, are as they were" in m for m in found["messages"])
    assert found["latest"] == "s3://data/run/iter_0000001"
    assert found["left"] == ["iter_0000001", "iter_0000003", "latest_checkpointed_iteration.txt"]
    assert found["same"], "the checkpoint after it holds the weights of its moment"
