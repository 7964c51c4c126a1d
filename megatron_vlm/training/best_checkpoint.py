"""The best weights of a run by a metric of its evaluations, kept in SAVE/best beside what is pruned.

SAVE/best is a save folder with one checkpoint, so that it can be given to --pretrained-checkpoint or be exported. It
holds weights only.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from megatron_vlm.config import Recipe
from megatron_vlm.runtime.logging import log_rank0
from megatron_vlm.runtime.s3.path import storage_path
from megatron_vlm.training.checkpoint import Checkpointer, CheckpointError, Progress

FOLDER = "best"


class BestCheckpoint:
    """Saves the weights whenever training.best_metric is lower than ever before; every rank makes the same calls."""

    def __init__(self, recipe: Recipe) -> None:
        """A collective call. The recipe must have best_metric and save."""
        training = recipe.training
        assert training.best_metric is not None and training.save is not None
        self.metric = training.best_metric
        self.folder = storage_path(training.save) / FOLDER
        changed = replace(training, save=str(self.folder), save_total_limit=1, save_retain_interval=None)
        self._checkpointer = Checkpointer(replace(recipe, training=changed), training.distributed_timeout_minutes)

    def consider(self, values: dict[str, Any], chunks: list[Any], progress: Progress) -> None:
        """Save the weights if `values`, of an evaluation, are the best so far; progress.best_metric then changes."""
        value = values.get(self.metric)
        if value is None or not math.isfinite(value):
            return
        if progress.best_metric is not None and value >= progress.best_metric:
            return
        self._report()
        progress.best_metric = value
        log_rank0(f"{self.metric} {value:.4f} is the best so far: saving the weights in {self.folder}")
        self._checkpointer.save(chunks, progress)

    def close(self) -> None:
        """Wait for what is being written."""
        self._report()
        self._checkpointer.close()

    def _report(self) -> None:
        """Wait for the checkpoint that is being written. One that failed is reported, and training continues."""
        try:
            self._checkpointer.wait()
        except CheckpointError as error:
            log_rank0(f"WARNING: {error}. Training continues")
