"""Hooks of a run for code that is not part of this project."""

from __future__ import annotations

from typing import Any

from megatron_vlm.runtime.s3.path import StoragePath


class Callback:
    """Override what is needed, and pass an instance to `megatron_vlm.training.trainer.train`.

    Every rank calls the methods, at the same points of the run. What they raise ends the run.
    """

    def on_train_start(self, trainer: Any) -> None:
        """Before the first iteration, with the `training.trainer.Trainer` of this rank."""

    def on_step(self, iteration: int, metrics: dict[str, Any]) -> None:
        """After the update of `iteration` (from 1).

        Args:
            iteration: its number.
            metrics: lm_loss, grad_norm, learning_rate, loss_tokens, rows and update_skipped; the same on every rank.
        """

    def on_eval(self, iteration: int, metrics: dict[str, float]) -> None:
        """After an evaluation, whose metrics are the same on every rank."""

    def on_save(self, iteration: int, checkpoint: StoragePath) -> None:
        """After the checkpoint of `iteration` was written as a whole, perhaps some iterations later.

        `checkpoint` is a Path, or an S3Path where training.save is an s3:// prefix.
        """
