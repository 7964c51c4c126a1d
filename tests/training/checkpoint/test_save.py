"""Saving and loading on four ranks; the cases are in run_checkpoints.py and run in one start of the ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.forked_ranks import launch_forked


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    launch_forked("-m", "tests.training.checkpoint.run_checkpoints", str(folder), ranks=4, timeout=280)
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_resumes_in_every_layout(results: dict[str, Any]) -> None:
    """Through six layouts one after the other, each loading what the one before saved."""
    differences = results["resume_in_another_layout"]["loss"]
    assert len(differences) == 6 and max(map(abs, differences.values())) < 1e-6, differences


def test_adapters_resume_in_another_layout(results: dict[str, Any]) -> None:
    found = results["adapters_resume_in_another_layout"]
    assert len(found["loss"]) == 2 and max(map(abs, found["loss"].values())) < 1e-6, found
    message = "holds LoRA adapters (lora_r 6, lora_alpha 256.0, lora_target_modules"
    assert message in found["without"] and "asks for none" in found["without"], found["without"]


def test_adapters_begin_on_a_model_without(results: dict[str, Any]) -> None:
    found = results["adapters_begin_on_a_model_without"]
    assert abs(found["loss"]) < 1e-6 and found["moved"]


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


def test_a_disk_that_is_full_and_a_writer_that_dies(results: dict[str, Any]) -> None:
    """On one rank, before it writes and in the middle of a file."""
    found = results["one_rank_cannot_write"]
    reasons = {
        "full_before_writing": "iteration 2 could not be written: rank 2: No space left on device",
        "full_in_the_middle": "iteration 3 could not be written: rank 2: File too large",
        "writer_dies": "iteration 4 could not be written: rank 2: SystemExit",
    }
    for case, reason in reasons.items():
        assert all(reason in message for message in found["messages"][case]), found["messages"][case]
        assert found["latest"][case] == "iter_0000001"
    assert found["then"] == "iter_0000005" and abs(found["in_another_layout"]) < 1e-6
    assert found["left"] == ["iter_0000001", "iter_0000005", "latest_checkpointed_iteration.txt"]


def test_a_rank_that_sees_an_older_listing(results: dict[str, Any]) -> None:
    """It waits for the checkpoint that rank 0 resumes from; if that never appears, it says so."""
    found = results["a_rank_sees_an_older_listing"]
    assert found["late"] == ["iter_0000002"] * 4
    assert [bool(message) for message in found["never"]] == [False, False, True, False]
    assert "rank 2 on" in found["never"][2] and "iter_0000002, from which rank 0 resumes" in found["never"][2]


def test_save_holds_its_moment(results: dict[str, Any]) -> None:
    assert results["training_changes_nothing_that_is_being_written"] == {
        "same": True, "moved": True, "tracked": 1, "found": "iter_0000001",
    }  # fmt: skip


def test_two_instances_of_the_optimizer(results: dict[str, Any]) -> None:
    """Each of two data ranks holds half of the optimizer state, and each value of it is written once."""
    found = results["two_instances_of_the_optimizer"]
    assert max(map(abs, [*found["losses"], *found["again"].values()])) < 1e-6, found
    assert found["state"] == pytest.approx(2, rel=0.1)
    assert found["norms"] == pytest.approx([1, 1, 1], rel=1e-6)
    assert found["overlapping"] == [] and max(found["sizes"]) < 1.5 * min(found["sizes"]), found["sizes"]
