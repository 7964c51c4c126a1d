"""Rows for training, from a recipe and one counter.

    data_path -> sources -> length index -> mixture of the epoch -> plan -> this rank's rows -> workers -> PackedBatch

Every rank opens the data and has the whole plan; what a rank reads differs only in which rows it takes (data
parallelism) and which tiles of a row it decodes (tile_rank). The first call on a machine measures lengths and plans,
and keeps both in files; let one process of each machine do it first: the others map the files into memory.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from megatron_vlm.data.batch import PackedBatch
from megatron_vlm.data.dataset import open_dataset, open_plan_cache
from megatron_vlm.data.errors import DataError, RowError
from megatron_vlm.data.packing.row_plan import PlannedRow, RowPlan
from megatron_vlm.data.plan_fingerprint import plan_inputs
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.data.row_builder import RowBuilder
from megatron_vlm.data.worker_transport import SharedBatch

if TYPE_CHECKING:
    from megatron_vlm.config import Recipe

logger = logging.getLogger(__name__)

_ROWS_AHEAD_PER_WORKER = 2
_NAMED = 5


class _Failure:
    """What a worker sends in place of a row that it could not build."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Rows(Dataset[PackedBatch]):
    """Planned rows as torch's DataLoader wants them."""

    def __init__(self, builder: RowBuilder) -> None:
        self._builder = builder

    def __getitem__(self, row: PlannedRow) -> PackedBatch | SharedBatch | _Failure:  # type: ignore[override]
        try:
            batch = self._builder.build(row)
            return batch if get_worker_info() is None else SharedBatch(batch)
        except RowError as error:
            return _Failure(str(error))
        except Exception as error:
            logger.exception("row %d cannot be built", row.row_index)
            return _Failure(f"row {row.row_index} cannot be built: {type(error).__name__}: {error}")


class _Order(Sampler[PlannedRow]):
    """This rank's rows, without end; keeps those that were handed to workers and have not come back."""

    def __init__(self, rows: Iterator[PlannedRow]) -> None:
        self._rows = rows
        self.outstanding: deque[PlannedRow] = deque()

    def __iter__(self) -> Iterator[PlannedRow]:
        for row in self._rows:
            self.outstanding.append(row)
            yield row


class RowLoader(Iterator[PackedBatch]):
    """Yields this rank's rows in order, for ever."""

    def __init__(
        self,
        plan: RowPlan,
        builder: RowBuilder,
        counts: dict[str, Any],
        rows: Iterator[PlannedRow],
        num_workers: int,
        plan_inputs: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            plan: all rows of the run.
            builder: makes a batch of a row.
            counts: what `summary` reports of the data.
            rows: those of this rank.
            num_workers: processes that build rows; 0: they are built when asked for.
            plan_inputs: what the order of rows follows from, see `plan_inputs.py`.
        """
        self.plan = plan
        self.tokenizer: Tokenizer = builder.tokenizer
        self.data_wait_seconds = 0.0
        """Time spent waiting for rows; set it to 0 to start anew."""
        self.plan_inputs = plan_inputs or {}
        self._counts = counts
        self._order = _Order(rows)
        self._sources = builder.sources
        workers: dict[str, Any] = {}
        if num_workers:
            workers = {
                "multiprocessing_context": "fork",  # the annotations are shared with the workers, not copied
                "prefetch_factor": _ROWS_AHEAD_PER_WORKER,
            }
        loader = DataLoader(
            _Rows(builder),
            sampler=self._order,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            **workers,
        )
        self._batches: Iterator[Any] | None = _start(loader)

    def __next__(self) -> PackedBatch:
        """
        Raises:
            RowError: a row cannot be built, or a worker died; the message names the row and what is in it.
        """
        if self._batches is None:
            raise RowError("the loader is closed")
        started = time.perf_counter()
        try:
            batch = next(self._batches)
        except (RuntimeError, EOFError, OSError) as error:
            # RuntimeError is torch's word for a worker that died; the others mean that it died while handing a row over
            waiting = self._order.outstanding[0]
            raise RowError(
                f"row {waiting.row_index} did not come: {type(error).__name__} {error}. It holds "
                f"{self._name(waiting)}. A worker that was killed usually ran out of memory: give fewer num_workers, "
                "or more memory to the machine or container."
            ) from error
        finally:
            self.data_wait_seconds += time.perf_counter() - started
        self._order.outstanding.popleft()
        if isinstance(batch, _Failure):
            raise RowError(batch.message)
        return batch

    def _name(self, row: PlannedRow) -> str:
        located = [self._sources.locate(number) for number in row.members.tolist()]
        named = ", ".join(
            f"sample {index} of {self._sources.sources[source].name}" for source, index in located[:_NAMED]
        )
        return named + (f" and {len(located) - _NAMED} more" if len(located) > _NAMED else "")

    @property
    def source_names(self) -> list[str]:
        """The files and folders that samples come from."""
        return [source.name for source in self._sources.sources]

    @property
    def worker_pids(self) -> list[int]:
        """Processes that build rows."""
        return [worker.pid for worker in getattr(self._batches, "_workers", [])]

    def summary(self) -> dict[str, Any]:
        """Samples, usable, refused (by reason), skipped and cut (too long); rows and fill of this epoch."""
        epoch = {"rows_per_epoch": self.plan.rows, "samples_per_epoch": len(self.plan.current.members)}
        return {**self._counts, **epoch, "pack_fill": self.plan.packing_efficiency}

    def close(self) -> None:
        """End the workers. Nothing can be read afterwards."""
        self._batches = None  # torch ends the workers with their iterator


def _start(loader: DataLoader[PackedBatch]) -> Iterator[Any]:
    """Start the workers, without the handler by which torch raises wherever the main thread is when one dies.

    A worker that died is found within seconds by the call that waits for its row, which can say what the row holds.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)  # torch sets no handler here
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, handler)
    return batches


def _unchanged(batch: Any) -> Any:
    return batch


def build_loader(
    recipe: Recipe,
    *,
    dp_rank: int,
    dp_size: int,
    consumed_rows: int,
    need_tiles: bool,
    tile_rank: int = 0,
    tile_ranks: int = 1,
    plan_ahead: bool = False,
) -> RowLoader:
    """Open the data of a recipe.

    The rows of step s are those numbered `consumed_rows` + s * global_batch_size and following; the m-th of this rank
    is m * dp_size + dp_rank further on. Which samples a row holds follows from the seed and its number alone.

    Args:
        recipe: its data, model, training.seed and training.global_batch_size are used.
        dp_rank: this rank among the data-parallel ones.
        dp_size: their number; divides global_batch_size.
        consumed_rows: rows that all ranks together have consumed since the start of training.
        need_tiles: False: no image is decoded and PackedBatch.tiles is None.
        tile_rank: this rank among those that share the tiles of a row (see batch.tile_range).
        tile_ranks: their number.
        plan_ahead: a process beside this one makes the plan of each next epoch; one rank of a machine does for all.

    Raises:
        DataError: something of the data cannot be opened, nothing usable is in it, or a sample is longer than a row and
            oversized_samples is `error`.
    """
    if recipe.training.global_batch_size % dp_size:
        raise DataError(f"global_batch_size {recipe.training.global_batch_size} is no multiple of {dp_size} data ranks")
    is_logging_rank = dp_rank == 0 and need_tiles and tile_rank == 0  # one process of the whole run
    opened = open_dataset(recipe, is_logging_rank)
    inputs = plan_inputs(recipe, opened)
    store = open_plan_cache(recipe, opened, inputs)
    if plan_ahead and recipe.data.num_workers:
        store.plan_ahead()
    plan = RowPlan(store)
    builder = RowBuilder(
        opened.mixture.sources, opened.indexes, opened.tokenizer, opened.geometry, recipe.model.image_token_index,
        recipe.data.seq_length, (tile_rank, tile_ranks) if need_tiles else None, opened.truncations,
    )  # fmt: skip
    rows = plan.rows_of_rank(consumed_rows, dp_rank, dp_size)
    return RowLoader(plan, builder, opened.counts, rows, recipe.data.num_workers, inputs)
