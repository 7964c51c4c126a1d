"""Metrics of a run: a log line, TensorBoard, and metrics.jsonl with one JSON object per iteration."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.config import Recipe
from megatron_vlm.data.rank_batch import AnyBatch
from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.json_lines import keep_lines
from megatron_vlm.runtime.logging import log_rank0
from megatron_vlm.runtime.process_groups import ParallelRanks

METRICS_FILE = "metrics.jsonl"


class RowCounter:
    """Iterates over a rank's rows and counts them for the metrics; only one rank of those with the same rows counts."""

    def __init__(self, rows: Any, ranks: ParallelRanks) -> None:
        self.rows, self.is_counting = rows, ranks.is_row_leader and ranks.is_first_stage
        self.tokens = self.tiles = self.num_rows = 0
        self.wait_seconds = 0.0
        self._sample_ids: list[str] = []

    def __iter__(self) -> RowCounter:
        return self

    def __next__(self) -> AnyBatch:
        started = time.perf_counter()
        batch: AnyBatch = next(self.rows)
        self.wait_seconds += time.perf_counter() - started
        if self.is_counting:
            self.tokens += batch.num_tokens
            self.tiles += batch.num_tiles
            self.num_rows += 1
            self._sample_ids += batch.sample_ids
        return batch

    def take_sample_ids(self) -> list[str]:
        """The samples of the counted rows since the last call."""
        taken, self._sample_ids = self._sample_ids, []
        return taken

    def collect(self) -> dict[str, float]:
        """Totals over all data ranks, and the longest time that any rank waited for data, since the last call."""
        sums = torch.tensor([self.tokens, self.tiles, self.num_rows], dtype=torch.double, device=current_device())
        longest = torch.tensor([self.wait_seconds], dtype=torch.double, device=current_device())
        dist.all_reduce(sums)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        self.tokens = self.tiles = self.num_rows = 0
        self.wait_seconds = 0.0
        tokens, tiles, rows = sums.tolist()
        return {"tokens": tokens, "tiles": tiles, "rows": rows, "data_wait_ms": 1000 * longest.item()}


class MetricsLog:
    """Writes metrics to the save folder and the log on rank 0; does nothing on other ranks.

    What a killed run wrote after `first_iteration`, the iteration of its checkpoint, is removed.
    """

    def __init__(self, recipe: Recipe, first_iteration: int) -> None:
        self.recipe = recipe
        self.file: Any = None
        self.tensorboard: Any = None
        if dist.get_rank() == 0 and recipe.training.save:
            folder = Path(recipe.training.save)
            folder.mkdir(parents=True, exist_ok=True)
            self.file = _open_truncated(folder / METRICS_FILE, first_iteration)
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_iteration + 1)

    def write(self, iteration: int, values: dict[str, Any]) -> None:
        """Write the values of one iteration."""
        if self.file is not None:
            # JSON has no NaN
            known = {name: None if _is_not_finite(value) else value for name, value in values.items()}
            self.file.write(json.dumps({"iteration": iteration, **known}) + "\n")
            self.file.flush()
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, iteration)
        total = self.recipe.training.train_iters
        if iteration % self.recipe.training.log_interval == 0 or iteration == total:
            log_rank0(
                f"iteration {iteration:>{len(str(total))}}/{total} | lm loss {values['lm_loss']:.4f} | "
                f"grad norm {values['grad_norm']:.3f} | lr {values['learning_rate']:.2e} | "
                f"packing {100 * values['pack_fill']:.1f} % | {values['tokens_per_second']:,.0f} tokens/s | "
                f"data wait {values['data_wait_ms']:.0f} ms"
            )

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.tensorboard.close()


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _open_truncated(path: Path, iteration: int) -> Any:
    """The file, opened for appending, without the lines after `iteration`."""
    if path.is_file():
        keep_lines(path, lambda line: line["iteration"] <= iteration)
    return path.open("a")
