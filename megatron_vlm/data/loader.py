"""The data loader: packed rows for training, from a recipe and the index of the first row.

    data_path -> sources -> length index -> samples of the epoch -> plan -> rows of this rank -> workers -> PackedBatch
                                                                                                    -> RankBatch

Every rank opens the dataset and has the whole plan. Ranks differ only in which rows they read (data parallelism) and
which tiles of a row they decode (tile_rank). The first call on a machine measures lengths and plans the epoch, and
caches both in files. Let one process per machine do that first: the others then map the files into memory.
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

from megatron_vlm.data.errors import DataError, RowError
from megatron_vlm.data.packing.row_plan import PlannedRow, RowPlan
from megatron_vlm.data.planned_data import PlannedData, plan_data
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.data.rows.rank_batch import AnyBatch, RankView, rank_batch
from megatron_vlm.data.rows.row_builder import RowBuilder
from megatron_vlm.data.rows.worker_transport import SharedBatch

if TYPE_CHECKING:
    from megatron_vlm.config import Recipe

logger = logging.getLogger(__name__)

_ROWS_AHEAD_PER_WORKER = 2
_MAX_EXAMPLES = 5
_GRACE_SECONDS = 120
"""For which a worker lives on after SIGTERM."""


class _Failure:
    """Sent by a worker in place of a row that it could not build."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Rows(Dataset[AnyBatch]):
    """Builds planned rows; a dataset for torch's DataLoader."""

    def __init__(self, builder: RowBuilder, view: RankView | None) -> None:
        self._builder, self._view = builder, view

    def __getitem__(self, row: PlannedRow) -> AnyBatch | SharedBatch | _Failure:  # type: ignore[override]
        try:
            packed = self._builder.build(row)
            batch: AnyBatch = packed if self._view is None else rank_batch(packed, self._view)
            return batch if get_worker_info() is None else SharedBatch(batch)
        except RowError as error:
            return _Failure(str(error))
        except Exception as error:
            logger.exception("row %d cannot be built", row.row_index)
            return _Failure(f"row {row.row_index} cannot be built: {type(error).__name__}: {error}")


class _RowSampler(Sampler[PlannedRow]):
    """This rank's rows, without end. Keeps the rows that were sent to workers and have not been returned yet."""

    def __init__(self, rows: Iterator[PlannedRow]) -> None:
        self._rows = rows
        self.outstanding: deque[PlannedRow] = deque()

    def __iter__(self) -> Iterator[PlannedRow]:
        for row in self._rows:
            self.outstanding.append(row)
            yield row


class RowLoader(Iterator[Any]):
    """Yields this rank's rows in order, without end: RankBatches if the loader has a view, otherwise PackedBatches."""

    def __init__(
        self,
        plan: RowPlan,
        builder: RowBuilder,
        counts: dict[str, Any],
        rows: Iterator[PlannedRow],
        num_workers: int,
        plan_inputs: dict[str, Any] | None = None,
        view: RankView | None = None,
    ) -> None:
        """
        Args:
            plan: all rows of the run.
            builder: builds the batch of a row.
            counts: of the dataset, for `summary`.
            rows: the rows of this rank.
            num_workers: number of processes that build rows; 0: they are built in this process, when asked for.
            plan_inputs: what determines the order of rows, see `plan_fingerprint.py`.
            view: the part of each row to yield; None: whole rows.
        """
        self.plan = plan
        self.tokenizer: Tokenizer = builder.tokenizer
        self.data_wait_seconds = 0.0
        """Time spent waiting for rows. May be reset to 0."""
        self.plan_inputs = plan_inputs or {}
        self._counts = counts
        self._sampler = _RowSampler(rows)
        self._sources = builder.sources
        workers: dict[str, Any] = {}
        if num_workers:
            workers = {
                "multiprocessing_context": "fork",  # workers share the annotations, without a copy
                "prefetch_factor": _ROWS_AHEAD_PER_WORKER,
                "worker_init_fn": _outlive_signals,
            }
        loader = DataLoader(
            _Rows(builder, view),
            sampler=self._sampler,
            batch_size=None,
            collate_fn=_identity,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            **workers,
        )
        self._batches: Iterator[Any] | None = _start(loader)

    def __next__(self) -> Any:
        """
        Raises:
            RowError: a row cannot be built, or a worker died. The message names the row and its samples.
        """
        if self._batches is None:
            raise RowError("the loader is closed")
        started = time.perf_counter()
        try:
            batch = next(self._batches)
        except (RuntimeError, EOFError, OSError) as error:
            # torch raises RuntimeError if a worker died; the others mean that it died while it sent a row.
            row = self._sampler.outstanding[0]
            raise RowError(
                f"no worker returned row {row.row_index}: {type(error).__name__} {error}. The row holds "
                f"{self._describe(row)}. A worker that was killed usually ran out of memory: set a lower num_workers, "
                "or give the machine or container more memory."
            ) from error
        finally:
            self.data_wait_seconds += time.perf_counter() - started
        self._sampler.outstanding.popleft()
        if isinstance(batch, _Failure):
            raise RowError(batch.message)
        return batch

    def _describe(self, row: PlannedRow) -> str:
        samples = [self._sources.locate(number) for number in row.members.tolist()]
        examples = ", ".join(
            f"sample {index} of {self._sources.sources[source].name}" for source, index in samples[:_MAX_EXAMPLES]
        )
        return examples + (f" and {len(samples) - _MAX_EXAMPLES} more" if len(samples) > _MAX_EXAMPLES else "")

    @property
    def source_names(self) -> list[str]:
        """File or folder of each source."""
        return [source.name for source in self._sources.sources]

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in getattr(self._batches, "_workers", [])]

    def summary(self) -> dict[str, Any]:
        """Counts of the dataset, see `MixtureDataset.counts`, and rows, samples and packing efficiency of the epoch."""
        epoch = {"rows_per_epoch": self.plan.rows, "samples_per_epoch": len(self.plan.current.members)}
        return {**self._counts, **epoch, "pack_fill": self.plan.packing_efficiency}

    def close(self) -> None:
        """Stop the workers. No row can be read afterwards."""
        self._batches = None  # torch stops the workers when their iterator is deleted


def _start(loader: DataLoader[AnyBatch]) -> Iterator[Any]:
    """Start the workers, without torch's SIGCHLD handler, which raises in the main thread as soon as a worker dies.

    Without it, the call that waits for the row of a dead worker notices within seconds, and can say what the row holds.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)  # torch sets no handler here
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, handler)
    return batches


def _outlive_signals(_: int) -> None:
    """Schedulers signal every process of a job: workers leave that to their rank, which needs rows to end its step."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


def _identity(batch: Any) -> Any:
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
    planned: PlannedData | None = None,
    view: RankView | None = None,
) -> RowLoader:
    """Open the dataset of a recipe and start loading.

    Step s takes the global_batch_size rows from row_index `consumed_rows` + s * global_batch_size on. Micro-batch m of
    this rank is row m * dp_size + dp_rank of them. The samples of a row depend on the seed and its row_index alone.

    Args:
        recipe: its data, model, training.seed and training.global_batch_size are used.
        dp_rank: data-parallel rank.
        dp_size: data-parallel size; must divide global_batch_size.
        consumed_rows: rows that all ranks together have consumed since the start of training.
        need_tiles: False: decode no image and leave PackedBatch.tiles as None.
        tile_rank: rank among those that share the tiles of a row, see batch.tile_range.
        tile_ranks: number of those ranks.
        planned: the recipe's dataset, if it is open already.
        view: yield the part of each row that this rank computes with, made by the workers, instead of whole rows.

    Raises:
        DataError: as plan_data.
    """
    if recipe.training.global_batch_size % dp_size:
        batch_size = recipe.training.global_batch_size
        raise DataError(f"global_batch_size {batch_size} is not a multiple of the data-parallel size {dp_size}")
    is_logging_rank = dp_rank == 0 and need_tiles and tile_rank == 0  # one process of the run
    planned = planned or plan_data(recipe, is_logging_rank=is_logging_rank)
    rows = planned.plan.rows_of_rank(consumed_rows, dp_rank, dp_size)
    return load_rows(recipe, planned, rows, (tile_rank, tile_ranks) if need_tiles else None, view)


def load_rows(
    recipe: Recipe,
    planned: PlannedData,
    rows: Iterator[PlannedRow],
    tile_shard: tuple[int, int] | None,
    view: RankView | None,
) -> RowLoader:
    """Start loading some rows.

    Args:
        recipe: its data and model are used.
        planned: the dataset of the rows.
        rows: in the order in which they are read.
        tile_shard: (rank, size) among the ranks that encode a row's tiles; None: this rank decodes no image.
        view: the part of each row to yield; None: whole rows.
    """
    dataset = planned.dataset
    builder = RowBuilder(
        dataset.mixture.sources, dataset.indexes, dataset.tokenizer, dataset.geometry, recipe.model.image_token_index,
        recipe.data.seq_length, tile_shard, dataset.truncations,
    )  # fmt: skip
    return RowLoader(planned.plan, builder, dataset.counts, rows, recipe.data.num_workers, planned.inputs, view)
