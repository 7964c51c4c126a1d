"""A training run from first weights or a checkpoint to the last iteration."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_vlm.config import Recipe
from megatron_vlm.data.batch import PackedBatch
from megatron_vlm.data.loader import RowLoader, build_loader
from megatron_vlm.data.plan_fingerprint import describe_changes
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.model.build import build_model
from megatron_vlm.model.initialize import initialize_weights
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.launch import local_rank
from megatron_vlm.runtime.logging import log_rank0
from megatron_vlm.runtime.process_groups import parallel_ranks, tile_shard_rank
from megatron_vlm.training.checkpoint import (
    CheckpointError,
    Progress,
    latest_checkpoint,
    load_checkpoint,
    require_checkpoint,
    save_checkpoint,
)
from megatron_vlm.training.metrics import MetricsLog, RowCounter
from megatron_vlm.training.optimizer import build_optimizer, build_schedule, learning_rate, wrap_for_data_parallel
from megatron_vlm.training.sample_log import SampleLog, cut_back
from megatron_vlm.training.step import forward_backward, global_loss, rows_for_chunks, update


class Trainer:
    """One rank's part of a run. Process groups must exist and the recipe must have passed its checks."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.ranks = recipe, parallel_ranks()
        self.fingerprint = load_tokenizer(recipe.data.tokenizer_model).fingerprint
        chunks = build_model(recipe)
        self.progress = Progress(tokenizer_fingerprint=self.fingerprint)
        resume_from = self._set_first_weights(chunks)
        self.chunks = wrap_for_data_parallel(chunks, recipe)
        self.optimizer = build_optimizer(self.chunks, recipe)
        self.schedule = build_schedule(self.optimizer, recipe)
        if resume_from is not None:
            self.progress = load_checkpoint(
                resume_from, self.chunks, recipe, tokenizer_fingerprint=self.fingerprint,
                optimizer=self.optimizer, schedule=self.schedule,
            )  # fmt: skip
            log_rank0(f"going on after iteration {self.progress.iteration} from {resume_from}")
        self.loader = self._open_data()
        self._check_order()
        self.row_counter = RowCounter(self._logged(self.loader), self.ranks)

    def _open_data(self) -> RowLoader:
        """The rows of this rank. One rank of each machine measures lengths first; the others find them in the cache."""
        tile_rank, tile_ranks = tile_shard_rank(self.recipe.parallel)

        def build() -> RowLoader:
            return build_loader(
                self.recipe,
                dp_rank=self.ranks.data,
                dp_size=self.ranks.data_size,
                consumed_rows=self.progress.consumed_rows,
                need_tiles=self.ranks.is_first_stage,
                tile_rank=tile_rank,
                tile_ranks=tile_ranks,
                plan_ahead=is_local_rank0,
            )

        is_local_rank0 = local_rank() == 0
        loader = build() if is_local_rank0 else None
        dist.barrier()
        loader = loader or build()
        log_rank0("data: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in loader.summary().items()))
        return loader

    def _check_order(self) -> None:
        """The rows to come must be those that would have come: nobody would notice others."""
        ours, theirs = self.loader.plan_inputs, self.progress.plan_inputs
        self.progress.plan_inputs = json.dumps(ours)
        changes = describe_changes(ours, json.loads(theirs), self.loader.source_names) if theirs else []
        if not changes:
            return
        what = f"what the order of samples follows from is not as it was at iteration {self.progress.iteration}"
        if not self.recipe.data.allow_changed_order:
            raise CheckpointError(
                f"{what}: {'; '.join(changes)}. Going on would repeat some samples of the epoch and leave out others. "
                "Put it back; or start a new stage with --pretrained-checkpoint and another --save; or accept it with "
                "--allow-changed-order."
            )
        log_rank0(f"{what}, which is allowed: {'; '.join(changes)}")

    def _logged(self, rows: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        """The same rows; one rank of those that share them lists their samples, if the recipe says so."""
        save = self.recipe.training.save
        if not self.recipe.data.log_samples or save is None:
            return rows
        folder = Path(save)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            cut_back(folder, self.progress.consumed_rows)
        dist.barrier()
        logs = self.ranks.is_row_leader and self.ranks.is_first_stage
        return SampleLog(rows, folder, dist.get_rank()) if logs else rows

    def _set_first_weights(self, chunks: list[VisionLanguageModel]) -> Path | None:
        """Weights of a new run. Returns the checkpoint to resume from instead, if there is one."""
        training = self.recipe.training
        resume_from = require_checkpoint(training.load) if training.load else None
        if resume_from is None and training.save:
            resume_from = latest_checkpoint(training.save)
        if resume_from is None and training.pretrained_checkpoint:
            source = require_checkpoint(training.pretrained_checkpoint)
            load_checkpoint(source, chunks, self.recipe, tokenizer_fingerprint=self.fingerprint)
            log_rank0(f"starting from the weights of {source}")
        elif resume_from is None:
            initialize_weights(chunks, self.recipe)
            log_rank0(f"starting from random weights, seed {training.seed}")
        return resume_from

    def run(self) -> None:
        """Train to the last iteration; save as the recipe says, and at the end."""
        training = self.recipe.training
        log = MetricsLog(self.recipe, self.progress.iteration)
        rows = rows_for_chunks(self.row_counter, len(self.chunks))
        while self.progress.iteration < training.train_iters:
            self._iteration(rows, log)
            last = self.progress.iteration == training.train_iters
            if training.save and (last or self.progress.iteration % training.save_interval == 0):
                self.save()
        log.close()
        self.loader.close()

    def _iteration(self, rows: list[Iterator[PackedBatch]], log: MetricsLog) -> None:
        started = time.perf_counter()
        rate = learning_rate(self.optimizer)
        totals = forward_backward(self.chunks, rows, self.recipe)
        loss, loss_tokens = global_loss(totals)
        updated, norm = update(self.optimizer)
        self.schedule.step(increment=1)
        self.progress.iteration += 1
        self.progress.consumed_rows += self.recipe.training.global_batch_size
        counts = self.row_counter.collect()
        capacity = counts["rows"] * self.recipe.data.seq_length
        log.write(
            self.progress.iteration,
            {
                "lm_loss": loss,
                "grad_norm": norm,
                "learning_rate": rate,
                "tokens": int(counts["tokens"]),
                "loss_tokens": loss_tokens,
                "tiles": int(counts["tiles"]),
                "pack_fill": counts["tokens"] / capacity,
                "tokens_per_second": counts["tokens"] / (time.perf_counter() - started),
                "data_wait_ms": counts["data_wait_ms"],
                "update_skipped": int(not updated),
            },
        )

    def save(self) -> None:
        folder = self.recipe.training.save
        assert folder is not None
        target = save_checkpoint(folder, self.chunks, self.recipe, self.progress, self.optimizer, self.schedule)
        log_rank0(f"saved {target}")


def train(recipe: Recipe) -> None:
    """Run a recipe on this rank."""
    trainer = Trainer(recipe)
    size = dist.get_world_size()
    parallel = recipe.parallel
    log_rank0(
        f"{size} rank{'s' if size > 1 else ''}: data {trainer.ranks.data_size} x tensor "
        f"{parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} (x "
        f"{parallel.virtual_pipeline_model_parallel_size} virtual) x context {parallel.context_parallel_size}, "
        f"tower {parallel.vision_parallel}"
    )
    trainer.run()
