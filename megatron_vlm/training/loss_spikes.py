"""Reports iterations whose loss is far above that of the iterations before, with the ids of their samples."""

from __future__ import annotations

import math
import statistics
from collections import deque

from megatron_vlm.config import Recipe
from megatron_vlm.runtime.logging import log_rank0
from megatron_vlm.training.run_files import run_folder
from megatron_vlm.training.sample_report import append_record, describe_samples, gather_samples

SPIKES_FILE = "loss_spikes.jsonl"
_WINDOW, _FEWEST = 50, 10
"""Iterations that a loss is compared with: at most and at least."""


class LossSpikes:
    """Compares each loss with the median of the last 50, which a spike itself moves little.

    Every rank makes one and makes the same calls. A resumed run starts with an empty window.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._factor, self._folder = recipe.training.loss_spike_factor, run_folder(recipe)
        self._recent: deque[float] = deque(maxlen=_WINDOW)

    def check(self, iteration: int, loss: float, sample_ids: list[str]) -> bool:
        """Report the iteration if its loss is a spike; returns whether it is.

        Args:
            iteration: number of the iteration, from 1.
            loss: of the whole step, the same on every rank.
            sample_ids: of the rows that this rank counts in this step; those of all ranks are reported.
        """
        if not math.isfinite(loss):  # an update that is not applied is reported as such
            return False
        known = len(self._recent) >= _FEWEST
        median = statistics.median(self._recent) if known else 0.0
        self._recent.append(loss)
        if not (self._factor and known and loss > self._factor * median):
            return False
        samples = gather_samples(sample_ids)
        log_rank0(
            f"WARNING: iteration {iteration} has loss {loss:.4f}, {loss / median:.1f} times the median of the "
            f"iterations before ({median:.4f}). {describe_samples(samples)}"
        )
        if self._folder is not None:
            record = {"iteration": iteration, "loss": loss, "median": median, "samples": samples}
            append_record(self._folder / SPIKES_FILE, record)
        return True
