"""Saving: every rank copies its share to host memory, training continues, and the files are written meanwhile.

One save is in flight at most. Its collectives run in a process group of their own, so that they do not meet those of
training. What goes wrong while writing, on any rank, is reported by the next call on every rank; older checkpoints are
untouched by it.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from megatron_vlm.config import Recipe, recipe_to_dict
from megatron_vlm.data.processing.chat_template import FILE as CHAT_TEMPLATE_FILE
from megatron_vlm.data.processing.tokenizer import chat_template_text
from megatron_vlm.runtime.atomic_files import atomic_file, atomic_folder
from megatron_vlm.training.checkpoint.errors import CheckpointError
from megatron_vlm.training.checkpoint.folder import (
    COMMON,
    FORMAT,
    INCOMPLETE,
    RECIPE,
    checkpoint_path,
    publish,
    remove_old,
)
from megatron_vlm.training.checkpoint.planner import ShardSavePlanner, copy_to_host, written_here
from megatron_vlm.training.checkpoint.progress import Progress
from megatron_vlm.training.checkpoint.shards import LocalState, model_state, optimizer_state
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
    done: Future[Path]


class Checkpointer:
    """Saves the state of a run; every rank makes one and makes the same calls."""

    def __init__(self, recipe: Recipe, timeout_minutes: int = 10) -> None:
        """A collective call.

        Args:
            recipe: its training.save is the folder; it is written into every checkpoint.
            timeout_minutes: of the collectives while writing; a rank whose disk is slower than this is an error.
        """
        self.recipe = recipe
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        self._poll = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._pending: _Pending | None = None
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

    def wait(self) -> Path | None:
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
            reasons = "; ".join(f"rank {rank}: {_reason(found[0])}" for rank, found in sorted(error.failures.items()))
        except Exception as error:
            reasons = _reason(error)
        raise CheckpointError(
            f"the checkpoint of iteration {pending.iteration} could not be written: {reasons}. "
            f"Older checkpoints in {self.recipe.training.save} are as they were"
        )

    @property
    def buffers(self) -> list[torch.Tensor]:
        """Host memory that this rank's share is copied to, kept for the next save."""
        return list(self._buffers.values())

    def is_writing(self) -> bool:
        """Whether a save is being written on any rank. A collective call."""
        return self._pending is not None and not self.is_written_everywhere()

    def is_written_everywhere(self) -> bool:
        """Whether a save has ended, on every rank, and nobody has waited for it yet. A collective call."""
        if self._pending is None:  # the same on every rank
            return False
        ended = torch.tensor(int(self._pending.done.done()))
        dist.all_reduce(ended, op=dist.ReduceOp.MIN, group=self._poll)
        return bool(ended)

    def close(self) -> None:
        """Wait for what is being written, then end the thread and the group. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            dist.destroy_process_group(self._group)
            dist.destroy_process_group(self._poll)

    def _write(self, state: LocalState, common: dict[str, Any], progress: Progress) -> Path:
        folder = Path(self.recipe.training.save or "")
        target = checkpoint_path(folder, progress.iteration)
        incomplete = target.with_name(target.name + INCOMPLETE)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=FutureWarning)
                writer, planner = _Writer(incomplete), ShardSavePlanner(state)
                dcp.save({}, storage_writer=writer, planner=planner, process_group=self._group)
            outcome: list[str | None] = [None]
            if dist.get_rank() == 0:
                try:
                    self._finish(incomplete, common, progress)
                except Exception as error:
                    outcome = [f"rank 0: {_reason(error)}"]
            dist.broadcast_object_list(outcome, src=0, group=self._group)
            if outcome[0] is not None:
                raise CheckpointError(outcome[0])
        except BaseException:
            if dist.get_rank() == 0:  # every rank has stopped writing when torch reports it
                shutil.rmtree(incomplete, ignore_errors=True)
            raise
        return target

    def _finish(self, incomplete: Path, common: dict[str, Any], progress: Progress) -> None:
        training = self.recipe.training
        with atomic_file(incomplete / COMMON) as file:
            torch.save(common, file)
        with atomic_file(incomplete / FORMAT) as file:
            file.write(json.dumps(_MEGATRON_FORMAT).encode())
        keep_tokenizer(self.recipe, incomplete.parent)
        with atomic_file(incomplete / RECIPE) as file:
            file.write(json.dumps(description(self.recipe, progress), indent=1).encode())
        publish(incomplete, progress.iteration)
        remove_old(incomplete.parent, training.save_total_limit, training.save_retain_interval)


class _Writer(dcp.FileSystemWriter):
    """torch's writer into a folder that is emptied first; files are on the disk before a rank says that it is done."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)
        self.folder = folder

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        # The coordinator alone runs this, when every rank has planned and before any writes.
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return list(super().prepare_global_plan(plans))

    def finish(self, metadata: Metadata, results: Any) -> None:
        for key, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                covered = sum(chunk.sizes.numel() for chunk in stored.chunks)
                if covered != stored.size.numel():
                    raise CheckpointError(f"{key}: ranks wrote {covered} of its {stored.size.numel()} values")
        super().finish(metadata, results)


def description(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """The content of recipe.json: what a person or a conversion wants to know without reading tensors."""
    return {"recipe": recipe_to_dict(recipe), "tokenizer_fingerprint": progress.tokenizer_fingerprint}


def keep_tokenizer(recipe: Recipe, folder: Path) -> None:
    """A checkpoint is of no use without its tokenizer: it travels along, whole or not at all."""
    source, kept = Path(recipe.data.tokenizer_model or "/nonexistent"), folder / "tokenizer"
    if kept.exists() or not source.exists():
        return
    with atomic_folder(kept) as staging_dir:
        if source.is_dir():
            shutil.copytree(source, staging_dir, dirs_exist_ok=True)
            # The template trained with, whatever the tokenizer had: the engine and exports find it here.
            template = chat_template_text(source, recipe.data.chat_template)
            (staging_dir / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
        else:
            shutil.copy(source, staging_dir)


def _plain(value: Any) -> Any:
    """A copy of nested dicts and lists, so that training cannot change what is being written."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _reason(error: BaseException) -> str:
    """What the operating system said, where it did: torch wraps it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.strerror}" + (f": {cause.filename}" if cause.filename else "")
        cause = cause.__cause__ or cause.__context__
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}".splitlines()[0]


def save_checkpoint(
    chunks: list[Any],
    recipe: Recipe,
    progress: Progress,
    optimizer: MegatronOptimizer | None = None,
    schedule: OptimizerParamScheduler | None = None,
) -> Path:
    """Write one checkpoint into recipe.training.save and wait for it; every rank calls this."""
    checkpointer = Checkpointer(recipe)
    checkpointer.save(chunks, progress, optimizer, schedule)
    written = checkpointer.wait()
    checkpointer.close()
    assert written is not None
    return written
