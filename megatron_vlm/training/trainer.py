"""A training run on one rank, from initial weights or a checkpoint to the last iteration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from megatron_vlm.config import Recipe
from megatron_vlm.data.loader import RowLoader, build_loader
from megatron_vlm.data.plan_fingerprint import check_order
from megatron_vlm.data.planned_data import PlannedData, plan_data
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.data.rows.rank_batch import AnyBatch
from megatron_vlm.data.sample_log import log_samples
from megatron_vlm.data.validation import open_validation
from megatron_vlm.model.build import build_model
from megatron_vlm.model.initialize import initialize_weights
from megatron_vlm.model.layers.attention_backend import describe_attention
from megatron_vlm.model.rank_view import rank_view
from megatron_vlm.model.sharding import unwrap
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.agreement import patient_group, require_agreement
from megatron_vlm.runtime.garbage_collection import ScheduledCollection
from megatron_vlm.runtime.launch import local_rank, local_rank0_first
from megatron_vlm.runtime.logging import log_rank0
from megatron_vlm.runtime.process_groups import parallel_ranks, tile_shard_rank
from megatron_vlm.runtime.s3.path import StoragePath
from megatron_vlm.training.best_checkpoint import BestCheckpoint
from megatron_vlm.training.callbacks import Callback
from megatron_vlm.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    Progress,
    checkpoint_to_resume,
    iteration_of,
    load_checkpoint,
    naming,
    read_progress,
    recipe_differences,
    require_checkpoint,
)
from megatron_vlm.training.finite_update import NonFiniteError, SkippedUpdates, update_and_loss
from megatron_vlm.training.loss_spikes import LossSpikes
from megatron_vlm.training.metrics import MetricsProcessor, ProfilerWindow
from megatron_vlm.training.optimizer import (
    build_optimizer,
    build_schedule,
    learning_rate,
    wrap_for_data_parallel,
)
from megatron_vlm.training.run_files import RunFiles, run_folder
from megatron_vlm.training.run_length import batch_size, resolve_epochs
from megatron_vlm.training.step import forward_backward, rows_for_chunks, sum_over_ranks
from megatron_vlm.training.stop import StopRequest
from megatron_vlm.training.validation import Validator
from megatron_vlm.training.watchdog import Watchdog


class Trainer:
    """Model, optimizer and rows of one rank. Process groups must exist and the recipe must have passed check_recipe.

    Raises:
        CheckpointError: a checkpoint is missing, incomplete, or does not fit the recipe.
        DataError: the data cannot be opened, or its order is not that of the checkpoint.
    """

    def __init__(self, recipe: Recipe, callbacks: Sequence[Callback] = ()) -> None:
        self.recipe, self.ranks, self.callbacks = recipe, parallel_ranks(), callbacks
        self.fingerprint = load_tokenizer(recipe.data.tokenizer_model).fingerprint
        chunks = build_model(recipe, for_training=True)
        self.progress = Progress(tokenizer_fingerprint=self.fingerprint)
        resume_from = self._load_initial_weights(chunks)
        self.chunks = wrap_for_data_parallel(chunks, recipe)
        with patient_group() as group:
            self.data, validation = self._plan_data(group)
            saved = Progress() if resume_from is None else read_progress(resume_from)
            self._require_agreement(saved, validation, group)
        resolve_epochs(recipe, self.data.plan.rows, saved)
        self.optimizer = build_optimizer(self.chunks, recipe)
        self.schedule = build_schedule(self.optimizer, recipe)
        if resume_from is not None:
            self.progress = load_checkpoint(
                resume_from, self.chunks, recipe, tokenizer_fingerprint=self.fingerprint,
                optimizer=self.optimizer, schedule=self.schedule,
            )  # fmt: skip
            log_rank0(f"resuming after iteration {self.progress.iteration} from {resume_from}")
            for difference in recipe_differences(resume_from, recipe):
                log_rank0(f"  setting changed since then: {difference}")
        with naming("training.save"):
            self.run_files = RunFiles(recipe, self.progress.consumed_rows)
        self.checkpointer = Checkpointer(recipe, recipe.training.distributed_timeout_minutes, self.run_files.send)
        self.loader = self._build_loader()
        self._check_order()
        self.metrics = MetricsProcessor(recipe, self.ranks, self.progress.iteration)
        rows = self.metrics.count(self._log_samples(self.loader))
        self.rows = rows_for_chunks(map(unwrap(self.chunks[0]).on_device, rows), len(self.chunks))
        self.skipped_updates = SkippedUpdates(recipe)
        self.loss_spikes = LossSpikes(recipe)
        self.profiler = ProfilerWindow(recipe)
        self.stop_request = StopRequest(recipe)
        self.watchdog = Watchdog(recipe.training.distributed_timeout_minutes)
        self.validation = validation
        self.validator = Validator(recipe, validation, self.ranks) if validation is not None else None
        self.best = BestCheckpoint(recipe) if recipe.training.best_metric is not None else None

    def _load_initial_weights(self, chunks: list[VisionLanguageModel]) -> StoragePath | None:
        """Set the weights of a new run; if there is a checkpoint to resume from, return it instead."""
        training = self.recipe.training
        resume_from = checkpoint_to_resume(training.save, training.load)
        if resume_from is None and training.pretrained_checkpoint:
            with naming("training.pretrained_checkpoint"):
                source = require_checkpoint(training.pretrained_checkpoint)
            initialize_weights(chunks, self.recipe, adapters_only=True)
            load_checkpoint(source, chunks, self.recipe, tokenizer_fingerprint=self.fingerprint)
            log_rank0(f"starting from the weights of {source}")
        elif resume_from is None:
            initialize_weights(chunks, self.recipe)
            log_rank0(f"starting from random weights, seed {training.seed}")
        return resume_from

    def _plan_data(self, group: dist.ProcessGroup) -> tuple[PlannedData, PlannedData | None]:
        """Training data, and validation data if there is any."""
        is_logging_rank = dist.get_rank() == 0
        with local_rank0_first(group):  # it measures lengths and plans rows; the other ranks find both in the cache
            data = plan_data(self.recipe, is_logging_rank=is_logging_rank, plan_ahead=local_rank() == 0)
            return data, open_validation(self.recipe, data, is_logging_rank)

    def _require_agreement(self, saved: Progress, validation: PlannedData | None, group: dist.ProcessGroup) -> None:
        """Every rank trains on the same rows from the same checkpoint, which is `saved`, or none does."""
        sources = self.data.dataset.mixture.sources.sources
        facts = {
            "the iteration to resume after": str(saved.iteration),
            "the number of consumed rows": str(saved.consumed_rows),
            "the tokenizer": self.fingerprint,
            "the plan of rows": self.data.plan.current.fingerprint(),
            "the plan of validation rows": "none" if validation is None else validation.plan.current.fingerprint(),
            **{f"the content of {source.name}": source.quick_hash() for source in sources},
        }
        require_agreement(facts, group)

    def _build_loader(self) -> RowLoader:
        tile_rank, tile_ranks = tile_shard_rank(self.recipe.parallel)
        loader = build_loader(
            self.recipe,
            dp_rank=self.ranks.data,
            dp_size=self.ranks.data_size,
            consumed_rows=self.progress.consumed_rows,
            need_tiles=self.ranks.is_first_stage,
            tile_rank=tile_rank,
            tile_ranks=tile_ranks,
            planned=self.data,
            view=rank_view(self.recipe),
        )
        log_rank0("data: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in loader.summary().items()))
        return loader

    def _check_order(self) -> None:
        progress, loader = self.progress, self.loader
        if progress.plan_inputs:
            changes = check_order(
                loader.plan_inputs, json.loads(progress.plan_inputs), loader.source_names,
                iteration=progress.iteration, allow_changes=self.recipe.data.allow_changed_order,
            )  # fmt: skip
            if changes:
                log_rank0(f"the order of samples has changed, which is allowed: {'; '.join(changes)}")
        progress.plan_inputs = json.dumps(loader.plan_inputs)

    def _log_samples(self, rows: Iterator[AnyBatch]) -> Iterator[AnyBatch]:
        folder = run_folder(self.recipe)
        if not self.recipe.data.log_samples or folder is None:
            return rows
        return log_samples(
            rows,
            folder,
            self.progress.consumed_rows,
            rank=dist.get_rank(),
            is_writer=self.ranks.is_row_leader and self.ranks.is_first_stage,
            barrier=dist.barrier,
        )

    def train(self) -> str | None:
        """Train to the last iteration; save every `save_interval` iterations and at the end.

        Returns:
            Why it stopped before the last iteration, after saving; None if it is finished.
        """
        for callback in self.callbacks:
            callback.on_train_start(self)
        garbage = ScheduledCollection(self.recipe.training.manual_gc_interval)
        with self.stop_request.catch_signals():
            stopped = self._train(garbage)
        self.watchdog.stop()
        garbage.close()
        self.metrics.close()
        self.profiler.close()
        self.loader.close()
        self.checkpointer.close()
        if self.validator is not None:
            self.validator.close()
        if self.best is not None:
            self.best.close()
        self.run_files.send_last()
        return stopped

    def _train(self, garbage: ScheduledCollection) -> str | None:
        training, progress = self.recipe.training, self.progress
        while progress.iteration < training.train_iters:
            self.watchdog.progress()
            try:
                self.profiler.before(progress.iteration + 1)
                self.train_step()
                self.profiler.after(progress.iteration)
            except NonFiniteError:  # on every rank; what is being written is from before
                self.metrics.flush()
                self._report_last_save()
                self.run_files.send_last()
                raise
            if self.validator is not None and self.validator.is_due(progress.iteration):
                self.metrics.add(self._evaluate(self.validator))
            self.metrics.write()
            stopped, is_writing = self.stop_request.ask(
                progress.iteration, is_writing=self.checkpointer.is_writing_here()
            )
            last = stopped is not None or progress.iteration == training.train_iters
            if training.save and (last or progress.iteration % training.save_interval == 0):
                self.metrics.sync()  # what a checkpoint covers is never lost
                with self.watchdog.paused(), self.metrics.timer.phase("checkpoint"):
                    self.save(wait=last or not training.async_save)
            elif self.checkpointer.is_unreported and not is_writing:
                self._report_last_save()
            garbage.after(progress.iteration)
            if stopped is not None:
                return stopped
        return None

    def _evaluate(self, validator: Validator) -> dict[str, float]:
        timer = self.metrics.timer
        with self.watchdog.paused():
            with timer.phase("evaluation"):
                values = validator.run(self.chunks)
            log_rank0("evaluation: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
            if self.best is not None:
                with timer.phase("checkpoint"):
                    self.best.consider(values, self.chunks, self.progress)
        for callback in self.callbacks:
            callback.on_eval(self.progress.iteration, values)
        return values

    def train_step(self) -> None:
        """Train on the next `batch_size` rows, update the weights, and hand the metrics of the step to `metrics`."""
        progress, timer = self.progress, self.metrics.timer
        rows = batch_size(self.recipe.training, progress.consumed_rows)
        lr = learning_rate(self.optimizer)

        self.metrics.start_step()
        with timer.phase("forward_backward"):
            totals = forward_backward(self.chunks, self.rows, self.recipe, rows_per_step=rows)
        self.metrics.measure_gradients(self.chunks, progress.iteration + 1)
        totals = sum_over_ranks(totals)
        with timer.phase("optimizer"):
            updated, grad_norm, loss, supervised_tokens = update_and_loss(self.optimizer, totals)

        progress.iteration += 1
        progress.consumed_rows += rows
        values = {
            "lm_loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": lr,
            "loss_tokens": supervised_tokens,
            "rows": rows,
            "update_skipped": int(not updated),
        }
        sample_ids = self.metrics.end_step(progress.iteration, values)
        if updated:
            self.schedule.step(increment=1)
            self.skipped_updates.applied()
            self.loss_spikes.check(progress.iteration, loss, sample_ids)
        else:
            self.skipped_updates.skipped(progress.iteration, loss, grad_norm, sample_ids)
        for callback in self.callbacks:
            callback.on_step(progress.iteration, dict(values))

    def save(self, *, wait: bool = True) -> None:
        """Save a complete checkpoint in `training.save`; every rank calls this.

        Args:
            wait: until it is on the disk; otherwise it is written while training continues.

        Raises:
            CheckpointError: with `wait`, it could not be written.
        """
        with_optimizer = self.recipe.training.save_optim
        optimizer, schedule = (self.optimizer, self.schedule) if with_optimizer else (None, None)
        self._report_last_save()
        self.checkpointer.save(self.chunks, self.progress, optimizer, schedule)
        if wait:
            self._report_saved(self.checkpointer.wait())

    def _report_last_save(self) -> None:
        """Wait for the checkpoint that is being written. One that failed is reported, and training continues."""
        try:
            written = self.checkpointer.wait()
        except CheckpointError as error:
            log_rank0(f"WARNING: {error}. Training continues; the next checkpoint is tried as usual")
        else:
            if written is not None:
                self._report_saved(written)

    def _report_saved(self, checkpoint: StoragePath | None) -> None:
        log_rank0(f"saved {checkpoint}")
        for callback in self.callbacks:
            if checkpoint is not None:
                callback.on_save(iteration_of(checkpoint), checkpoint)


def train(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> bool:
    """Train a recipe on this rank; arguments and errors as in Trainer. Returns whether it is finished."""
    trainer = Trainer(recipe, callbacks)
    size = dist.get_world_size()
    parallel = recipe.parallel
    log_rank0(
        f"{size} rank{'s' if size > 1 else ''}: data {trainer.ranks.data_size} x tensor "
        f"{parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} (x "
        f"{parallel.virtual_pipeline_model_parallel_size} virtual) x context {parallel.context_parallel_size}, "
        f"vision_parallel {parallel.vision_parallel}"
    )
    log_rank0(describe_attention(recipe))
    if recipe.training.save is None:
        log_rank0("WARNING: there is no --save, so the trained model is thrown away at the end")
    stopped = trainer.train()
    if stopped is not None:
        log_rank0(f"stopped after iteration {trainer.progress.iteration}, because {stopped}. {_how_to_resume(recipe)}")
    return stopped is None


def _how_to_resume(recipe: Recipe) -> str:
    if recipe.training.save is None:
        return "WARNING: nothing is saved, because there is no --save"
    return f"The same command resumes from {recipe.training.save}"
