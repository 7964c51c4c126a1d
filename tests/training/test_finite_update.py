"""A loss or gradient that is NaN or infinite: not applied, counted, its samples named, and too many end the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked_ranks import launch_forked
from tests.training.run_nonfinite import CASES
from tests.training.tiny_run import metrics, run, write_recipe


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("nonfinite")
    launch_forked("-m", "tests.training.run_nonfinite", folder, ranks=2, timeout=180)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_no_rank_applies_it_and_training_continues(results: list[dict[str, Any]], case: str) -> None:
    for rank in results:
        found = rank[case]
        assert found["skipped"] == [True, True, True], "a NaN gradient, an infinite one, a NaN loss"
        assert found["norms"] == [False, False, True]
        assert found["unchanged"] and found["continues"], found


def test_too_many_in_a_row_are_an_error_and_their_samples_are_listed(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert "2 updates in a row" in rank["limit"]["message"] and "skipped_updates.jsonl" in rank["limit"]["message"]
        lines = rank["limit"]["lines"]
        assert [line["iteration"] for line in lines] == [5, 7, 8]
        assert all(line["samples"] == ["sample 0", "sample 1"] for line in lines)


def test_the_command_stops_with_a_message_and_keeps_the_older_checkpoint(tmp_path: Path) -> None:
    recipe, save = write_recipe(tmp_path), tmp_path / "run"
    done = run(recipe, save, "--train-iters", "1")
    flags = ("--train-iters", "20", "--lr", "1e30", "--clip-grad", "0", "--max-skipped-updates", "3")
    done = run(recipe, save, *flags, "--lr-decay-style", "constant", "--lr-warmup-fraction", "0", check=False)
    assert done.returncode != 0 and "Traceback" not in done.stdout
    assert "3 updates in a row" in done.stdout and "was not applied" in done.stdout
    skipped = [line for line in metrics(save) if line["update_skipped"]]
    assert len(skipped) == 3
    assert all(line["lm_loss"] is None or line["grad_norm"] is None for line in skipped)
    assert (save / "iter_0000001").is_dir()


@pytest.mark.parametrize("loss", [6.0, math.nan])
def test_the_loss_is_read_once_after_the_norm(loss: float) -> None:
    """Until then the host launches work without waiting for the device."""
    from megatron_vlm.training.finite_update import update_and_loss

    done: list[str] = []

    class Optimizer:
        def get_grad_norm(self) -> float:
            done.append("norm")
            return 2.0

        def step_with_ready_grads(self) -> bool:
            done.append("step")
            return True

        def step(self) -> tuple[bool, float, None]:
            norm = self.get_grad_norm()
            return self.step_with_ready_grads(), norm, None

        def zero_grad(self) -> None: ...

    class Totals:
        def tolist(self) -> list[float]:
            done.append("loss")
            return [loss, 3.0, 5.0]

    updated, norm, mean, count = update_and_loss(Optimizer(), Totals())  # type: ignore[arg-type]
    finite = math.isfinite(loss)
    assert done == ["norm", "loss", "step"][: 2 + finite]
    assert (updated, norm, count) == (finite, 2.0, 5) and (mean == 2.0 or not finite)
