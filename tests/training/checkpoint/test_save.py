"""Saving and loading on four ranks; the cases are in run_checkpoints.py and run in one start of the ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.launch import launch


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    launch("-m", "tests.training.checkpoint.run_checkpoints", str(folder), ranks=4, timeout=280)
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_resumes_in_every_layout(results: dict[str, Any]) -> None:
    """Through six layouts one after the other, each loading what the one before saved."""
    differences = results["resume_in_another_layout"]["loss"]
    assert len(differences) == 6 and max(map(abs, differences.values())) < 1e-6, differences


def test_every_data_rank_writes_its_share(results: dict[str, Any]) -> None:
    found = results["nothing_is_gathered"]
    assert len(found["sizes"]) == 4 and max(found["sizes"]) < 1.5 * min(found["sizes"]), found["sizes"]
    assert found["overlapping"] == []


def test_megatron_core_loads_the_same(results: dict[str, Any]) -> None:
    found = results["megatron_core_reads_it"]
    assert found["weights"] and found["optimizer"] and found["tensors"] > 50


def test_overlapped_parameter_gathering_saves_no_stale_weights(results: dict[str, Any]) -> None:
    found = results["stale_weights"]
    assert found["buckets"] > 3, "one bucket would hide it"
    assert found["stale_before"] > 0, "every rank had the new weights already: nothing was to be shown"
    assert found["furthest"] == 0


def test_disk_full_on_one_rank(results: dict[str, Any]) -> None:
    found = results["disk_full_on_one_rank"]
    assert all("iteration 2 could not be written: rank 2: No space left on device" in m for m in found["messages"])
    assert (found["latest"], found["then"]) == ("iter_0000001", "iter_0000003")
    assert found["left"] == ["iter_0000001", "iter_0000003", "latest_checkpointed_iteration.txt"]


def test_save_holds_its_moment(results: dict[str, Any]) -> None:
    assert results["training_changes_nothing_that_is_being_written"] == {"same": True, "moved": True}
