"""The dataset of a recipe: sources, sample lengths, which samples are usable, and the plans of its epochs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vlm.data.array_files import cache_folder
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.length_index import REJECTED, LengthIndex, describe_rejections, load_length_index
from megatron_vlm.data.packing.epoch_plan import Budget, EpochPlan, plan_epoch
from megatron_vlm.data.packing.plan_cache import PlanCache
from megatron_vlm.data.packing.row_cost import row_cost
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.processing.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.data.sources.mixture import Mixture, describe_mixture, open_mixture
from megatron_vlm.data.truncation import load_truncations

if TYPE_CHECKING:
    from megatron_vlm.config import Recipe
    from megatron_vlm.config.data import DataConfig

logger = logging.getLogger(__name__)

_MAX_EXAMPLES = 5


@dataclass
class DataSources:
    """The sources of a recipe and what their samples are encoded with. Nothing is measured yet."""

    mixture: Mixture
    tokenizer: Tokenizer
    geometry: ImageGeometry

    def load_indexes(self, data: DataConfig) -> list[LengthIndex]:
        """The length index of each source; those that are not cached are built now."""
        return [
            load_length_index(source, self.tokenizer, self.geometry, data.cache_dir, verify_images=data.verify_images)
            for source in self.mixture.sources.sources
        ]


@dataclass
class MixtureDataset(DataSources):
    """What rows are planned from and built with. n is the number of samples of all sources."""

    indexes: list[LengthIndex]
    """One per source."""
    tokens: np.ndarray
    """[n] tokens of each sample, after truncation; REJECTED for a rejected one."""
    tiles: np.ndarray
    """[n] tiles of each sample, after truncation."""
    usable: np.ndarray
    """[n] bool: neither rejected nor skipped."""
    truncations: dict[int, tuple[int, int]]
    """(turns kept, their tokens) of each truncated sample, by global sample number."""
    counts: dict[str, Any]
    """samples, usable, rejected (by reason), skipped, truncated, tokens_dropped, tokens_per_sample, tiles_per_sample"""


def open_sources(recipe: Recipe) -> DataSources:
    """Open sources and tokenizer.

    Raises:
        DataError: something cannot be opened.
    """
    data = recipe.data
    mixture = open_mixture(data.data_path, data.image_folder, data.data_root, data.cache_dir, data.cache_limit)
    geometry = ImageGeometry.of(recipe.model, data.image_aspect_ratio, data.multi_image_aspect_ratio)
    return DataSources(mixture, load_tokenizer(data.tokenizer_model, data.chat_template), geometry)


def open_dataset(recipe: Recipe, is_logging_rank: bool) -> MixtureDataset:
    """Open sources and tokenizer, measure sample lengths or read them from the cache, and find the usable samples.

    Args:
        recipe: its data and model are used.
        is_logging_rank: log which samples are rejected, skipped and truncated. True in one process of a run.

    Raises:
        DataError: something cannot be opened, no sample is usable, or a sample is longer than a row and
            oversized_samples is `error`.
    """
    data, opened = recipe.data, open_sources(recipe)
    mixture, tokenizer = opened.mixture, opened.tokenizer
    image_token = recipe.model.image_token_index
    if len(tokenizer) > image_token and image_token not in tokenizer.placeholder_ids:
        raise DataError(
            f"tokenizer {tokenizer.path} has {len(tokenizer)} ids and image_token_index is "
            f"{recipe.model.image_token_index}: image tokens would collide with text tokens. "
            f"Set image_token_index to {len(tokenizer)}, or leave it out."
        )
    indexes = opened.load_indexes(data)
    if is_logging_rank:
        for source, index in zip(mixture.sources.sources, indexes, strict=True):
            for line in describe_rejections(source, index):
                logger.warning("%s", line)
    if len(tokenizer) < image_token and is_logging_rank:
        note = (
            f"model.image_token_index is {image_token}, but the tokenizer has {len(tokenizer)} ids: only a model with "
            f"image_token_index = {len(tokenizer)} can be exported. Leave it out to get that."
        )
        logger.warning("%s", note)
    tokens = np.concatenate([index.tokens for index in indexes])
    tiles = np.concatenate([index.tiles for index in indexes])
    rejected = Counter(rejection.reason for index in indexes for rejection in index.rejected)
    dataset = MixtureDataset(mixture, tokenizer, opened.geometry, indexes, tokens, tiles, tokens != REJECTED, {}, {})
    oversized = _handle_oversized(dataset, data, max_sample_tokens(recipe), is_logging_rank)
    usable = dataset.usable
    if not usable.any():
        reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.most_common()) or "no sample at all"
        raise DataError(
            f"the dataset is empty: none of {len(tokens)} samples of {', '.join(data.data_path)} is usable "
            f"({reasons}; {oversized['skipped']} longer than a row)"
        )
    if is_logging_rank and len(mixture.entries) > 1:
        table = describe_mixture(mixture, usable, tokens, tiles, recipe.training.seed)
        logger.info("samples of the first epoch:\n%s", table)
    dataset.counts = {
        "samples": len(tokens),
        "usable": int(usable.sum()),
        "rejected": dict(rejected),
        **oversized,
        "tokens_per_sample": float(tokens[usable].mean()),
        "tiles_per_sample": float(tiles[usable].mean()),
    }
    return dataset


def max_sample_tokens(recipe: Recipe) -> int:
    """The longest sample that is trained on. Positions restart in each sample of a row, so rows may be longer than the
    model's context, but samples may not.
    """
    return min(recipe.data.seq_length, recipe.model.language.max_position_embeddings)


def _handle_oversized(
    dataset: MixtureDataset, data: DataConfig, max_tokens: int, is_logging_rank: bool
) -> dict[str, int]:
    """Truncate, skip or reject the samples longer than a row, as oversized_samples says. Returns how many."""
    too_long = dataset.usable & ((dataset.tokens > max_tokens) | (dataset.tiles > data.max_tiles_per_row))
    oversized = np.flatnonzero(too_long)
    if not len(oversized):
        return {"skipped": 0, "truncated": 0, "tokens_dropped": 0}
    description = _describe_oversized(dataset, data, max_tokens, oversized)
    if data.oversized_samples == "error":
        limit = "seq_length" if max_tokens == data.seq_length else "max_position_embeddings"
        raise DataError(
            f"{description}. Raise {limit} or max_tiles_per_row, or set oversized_samples to truncate or skip."
        )
    dropped = _truncate(dataset, data, max_tokens) if data.oversized_samples == "truncate" else 0
    skipped = len(oversized) - len(dataset.truncations)
    dataset.usable[[number for number in oversized.tolist() if number not in dataset.truncations]] = False
    if is_logging_rank:
        actions = [f"{skipped} are skipped"] if skipped else []
        if dataset.truncations:
            actions.insert(0, f"{len(dataset.truncations)} are truncated after an answer, which drops {dropped} tokens")
        logger.warning("%s; %s", description, ", ".join(actions))
    return {"skipped": skipped, "truncated": len(dataset.truncations), "tokens_dropped": dropped}


def _describe_oversized(dataset: MixtureDataset, data: DataConfig, max_tokens: int, oversized: np.ndarray) -> str:
    examples, sources = [], dataset.mixture.sources
    for number in oversized[:_MAX_EXAMPLES].tolist():
        source, index = sources.locate(number)
        sample = sources.sources[source].metadata(index)
        lengths = f"{dataset.tokens[number]} tokens, {dataset.tiles[number]} tiles"
        examples.append(f"{sample.id!r} of {sample.file} ({lengths})")
    more = f" and {len(oversized) - _MAX_EXAMPLES} more" if len(oversized) > _MAX_EXAMPLES else ""
    room = (
        f"a row of {data.seq_length} tokens"
        if max_tokens == data.seq_length
        else f"the model's context of {max_tokens} tokens (model.language.max_position_embeddings) or a row"
    )
    return (
        f"{len(oversized)} samples are longer than {room} and {data.max_tiles_per_row} tiles: "
        f"{', '.join(examples)}{more}"
    )


def _truncate(dataset: MixtureDataset, data: DataConfig, max_tokens: int) -> int:
    """Replace the lengths of oversized samples by those after truncation. Returns the number of dropped tokens."""
    sources, dropped = dataset.mixture.sources, 0
    for start, source, index in zip(sources.starts[:-1].tolist(), sources.sources, dataset.indexes, strict=True):
        found = load_truncations(source, index, dataset.tokenizer, dataset.geometry, max_tokens, data.max_tiles_per_row)
        kept = found.turns > 0
        numbers = found.samples[kept] + start
        dropped += int((dataset.tokens[numbers] - found.tokens[kept]).sum())
        dataset.tokens[numbers], dataset.tiles[numbers] = found.tokens[kept], found.tiles[kept]
        pairs = zip(found.turns[kept].tolist(), found.tokens[kept].tolist(), strict=True)
        dataset.truncations.update(zip(numbers.tolist(), pairs, strict=True))
    return dropped


def open_plan_cache(recipe: Recipe, dataset: MixtureDataset, inputs: dict[str, Any]) -> PlanCache:
    """The plans of all epochs, cached beside the first source's length index under a hash of `inputs`."""
    data, seed = recipe.data, recipe.training.seed
    budget = Budget(data.seq_length, data.max_tiles_per_row, data.packing_window, row_cost(recipe))
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]

    def compute(epoch: int) -> EpochPlan:
        samples = dataset.mixture.sample_epoch(dataset.usable, seed, epoch)
        return plan_epoch(samples, dataset.tokens, dataset.tiles, budget, seed, epoch)

    folder = cache_folder(dataset.mixture.sources.sources[0].location, data.cache_dir)
    return PlanCache(folder, key, compute)
