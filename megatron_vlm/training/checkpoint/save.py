"""Saving: every rank copies its share to host memory, training continues, and the files are written meanwhile.

One save is in flight at most. Its collectives run in a process group of their own, so that they do not meet those of
training. What goes wrong while writing, on any rank, is reported by the next call on every rank; older checkpoints are
untouched by it.
"""

from __future__ import annotations

import io
import json
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vlm.config import Recipe, recipe_to_dict
from megatron_vlm.runtime.s3.path import StoragePath
from megatron_vlm.training.checkpoint.destination import destination_of
from megatron_vlm.training.checkpoint.errors import CheckpointError
from megatron_vlm.training.checkpoint.folder import COMMON, FORMAT, RECIPE
from megatron_vlm.training.checkpoint.planner import ShardSavePlanner, copy_to_host, written_here
from megatron_vlm.training.checkpoint.progress import Progress
from megatron_vlm.training.checkpoint.shards import LocalState, model_state, optimizer_state
from megatron_vlm.training.checkpoint.writer import ShardWriter, reason
from megatron_vlm.training.optimizer import synchronize_parameters

_MEGATRON_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What megatron-core writes into its metadata.json for this format."""


@dataclass
class _Pending:
    """A save that is being written."""

    iteration: int
    done: Future[StoragePath]


class Checkpointer:
    """Saves the state of a run; every rank makes one and makes the same calls."""

    def __init__(
        self, recipe: Recipe, timeout_minutes: int = 10, write_logs: Callable[[], None] = lambda: None
    ) -> None:
        """A collective call.

        Args:
            recipe: its training.save is the folder or s3:// prefix; it is written into every checkpoint.
            timeout_minutes: of the collectives while writing; a rank whose disk is slower than this is an error.
            write_logs: called on every rank, in the thread that writes, before a checkpoint is complete.
        """
        self.recipe = recipe
        self._destination, self._write_logs = destination_of(recipe.training.save or ""), write_logs
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._pending: _Pending | None = None
        self._is_published = False
        self.blocked_seconds = 0.0
        """How long the last call of `save` or `wait` kept training from continuing."""

    def save(
        self,
        chunks: list[Any],
        progress: Progress,
        optimizer: MegatronOptimizer | None = None,
        schedule: OptimizerParamScheduler | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Write a checkpoint of now. Returns when the state is copied, or with `wait` when it is on the disk.

        Without an optimizer only weights are saved.

        Raises:
            CheckpointError: this save with `wait`, or the one before it, failed; on every rank.
        """
        started = time.perf_counter()
        self.wait()
        progress = replace(progress)  # training changes its own while this checkpoint is written
        synchronize_parameters(chunks)
        state = model_state(chunks)
        common: dict[str, Any] = {"progress": vars(progress), "content_metadata": {"weights_only": optimizer is None}}
        if optimizer is not None and schedule is not None:
            whole = optimizer_state(optimizer, chunks, loading=False)
            state = LocalState(state.shards + whole.shards, state.objects + whole.objects)
            common |= {"optimizer": whole.common, "schedule": schedule.state_dict()}
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        copied = copy_to_host(written_here(state, dist.get_rank(group), group.size()), self._buffers)
        done = self._thread.submit(self._write, copied, _plain(common), progress)
        self._pending = _Pending(progress.iteration, done)
        if wait:
            self.wait()
        self.blocked_seconds = time.perf_counter() - started

    def wait(self) -> StoragePath | None:
        """Until nothing is being written. Returns the checkpoint that was, if there was one.

        Raises:
            CheckpointError: it could not be written; on every rank.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            return pending.done.result()
        except CheckpointException as error:
            reasons = "; ".join(f"rank {rank}: {reason(found[0])}" for rank, found in sorted(error.failures.items()))
        except Exception as error:
            reasons = reason(error)
        raise CheckpointError(
            f"the checkpoint of iteration {pending.iteration} could not be written: {reasons}. "
            f"Older checkpoints in training.save, {self.recipe.training.save}, are as they were"
        )

    @property
    def buffers(self) -> list[torch.Tensor]:
        """Host memory that this rank's share is copied to, kept for the next save."""
        return list(self._buffers.values())

    @property
    def is_unreported(self) -> bool:
        """Whether there is a save that nobody has waited for yet; the same on every rank."""
        return self._pending is not None

    def is_writing_here(self) -> bool:
        """Whether a save is being written on this rank."""
        return self._pending is not None and not self._pending.done.done()

    def close(self) -> None:
        """Wait for what is being written, then end the thread and the group. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            dist.destroy_process_group(self._group)

    def _write(self, state: LocalState, common: dict[str, Any], progress: Progress) -> StoragePath:
        self._is_published = False
        unfinished = self._on_rank0(lambda: self._destination.begin(progress.iteration))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=FutureWarning)
                writer = ShardWriter(unfinished, self._destination, self._write_logs)
                dcp.save({}, storage_writer=writer, planner=ShardSavePlanner(state), process_group=self._group)
            return self._on_rank0(lambda: self._finish(unfinished, common, progress))
        except BaseException:
            # Every rank has stopped writing when torch reports it. A rank that died since then harms no checkpoint.
            if dist.get_rank() == 0 and not self._is_published:
                self._destination.discard(unfinished)
            raise

    def _on_rank0(self, action: Callable[[], StoragePath]) -> StoragePath:
        """The result of rank 0, on every rank; or its error, as CheckpointError. A collective call."""
        outcome: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                outcome = [action(), None]
            except Exception as error:
                outcome = [None, f"rank 0: {reason(error)}"]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        result, failure = outcome
        if failure is not None:
            raise CheckpointError(failure)
        assert isinstance(result, StoragePath)
        return result

    def _finish(self, unfinished: StoragePath, common: dict[str, Any], progress: Progress) -> StoragePath:
        training, destination = self.recipe.training, self._destination
        content = io.BytesIO()
        torch.save(common, content)
        destination.write(unfinished / COMMON, content.getvalue())
        destination.write(unfinished / FORMAT, json.dumps(_MEGATRON_FORMAT).encode())
        data = self.recipe.data
        destination.keep_tokenizer(Path(data.tokenizer_model or "/nonexistent"), data.chat_template)
        written = json.dumps(description(self.recipe, progress), indent=1)
        destination.write(unfinished / RECIPE, written.encode())  # last: it makes the checkpoint whole
        published = destination.publish(unfinished, progress.iteration)
        self._is_published = True
        destination.remove_old(training.save_total_limit, training.save_retain_interval)
        return published


def description(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """The content of recipe.json: what a person or a conversion wants to know without reading tensors."""
    return {"recipe": recipe_to_dict(recipe), "tokenizer_fingerprint": progress.tokenizer_fingerprint}


def _plain(value: Any) -> Any:
    """A copy of nested dicts and lists, so that training cannot change what is being written."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def save_checkpoint(
    chunks: list[Any],
    recipe: Recipe,
    progress: Progress,
    optimizer: MegatronOptimizer | None = None,
    schedule: OptimizerParamScheduler | None = None,
) -> StoragePath:
    """Write one checkpoint into recipe.training.save and wait for it; every rank calls this."""
    checkpointer = Checkpointer(recipe)
    checkpointer.save(chunks, progress, optimizer, schedule)
    written = checkpointer.wait()
    checkpointer.close()
    assert written is not None
    return written
