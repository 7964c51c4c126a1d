"""The data of a recipe, opened: sources, lengths, which samples can be used, and the plan that follows."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.length_index import REJECTED, LengthIndex, cache_folder, describe_rejections, load_length_index
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

_NAMED = 5


@dataclass
class DataSources:
    """The data of a recipe and what its samples are encoded with. Nothing is measured yet."""

    mixture: Mixture
    tokenizer: Tokenizer
    geometry: ImageGeometry

    def load_indexes(self, cache_dir: str | None) -> list[LengthIndex]:
        """The length index of each source; samples that are not in the cache are measured now."""
        return [load_length_index(s, self.tokenizer, self.geometry, cache_dir) for s in self.mixture.sources.sources]


@dataclass
class MixtureDataset(DataSources):
    """What rows are planned from and built with; n samples over all sources."""

    indexes: list[LengthIndex]
    """One for each source."""
    tokens: np.ndarray
    """[n] of each sample, of what is kept of it where it is cut; REJECTED where it is refused"""
    tiles: np.ndarray
    """[n]"""
    usable: np.ndarray
    """[n] bool"""
    truncations: dict[int, tuple[int, int]]
    """(turns that are kept, their tokens) of the samples that are cut, by number."""
    counts: dict[str, Any]
    """samples, usable, refused by reason, skipped, cut and what the cuts leave out, tokens and tiles per sample"""


def open_sources(recipe: Recipe) -> DataSources:
    """Open sources and tokenizer.

    Raises:
        DataError: something cannot be opened.
    """
    data = recipe.data
    mixture = open_mixture(data.data_path, data.image_folder, data.data_root, data.cache_dir, data.cache_limit)
    geometry = ImageGeometry.of(recipe.model, data.image_aspect_ratio)
    return DataSources(mixture, load_tokenizer(data.tokenizer_model), geometry)


def open_dataset(recipe: Recipe, is_logging_rank: bool) -> MixtureDataset:
    """Open sources and tokenizer, measure lengths or read them from the cache, sort out what cannot be used.

    Args:
        recipe: its data and model are used.
        is_logging_rank: tell what is refused, skipped and cut: one process of a run does.

    Raises:
        DataError: something cannot be opened, nothing is usable, or a sample is longer than a row and
            oversized_samples is `error`.
    """
    data, opened_sources = recipe.data, open_sources(recipe)
    mixture, tokenizer = opened_sources.mixture, opened_sources.tokenizer
    if len(tokenizer) > recipe.model.image_token_index:
        raise DataError(
            f"tokenizer {tokenizer.path} has {len(tokenizer)} ids and image_token_index is "
            f"{recipe.model.image_token_index}: image positions would be taken for text. "
            "Set it to an id that the tokenizer does not give."
        )
    indexes = opened_sources.load_indexes(data.cache_dir)
    if is_logging_rank:
        for source, index in zip(mixture.sources.sources, indexes, strict=True):
            for line in describe_rejections(source, index):
                logger.warning("%s", line)
    tokens = np.concatenate([index.tokens for index in indexes])
    tiles = np.concatenate([index.tiles for index in indexes])
    refused = Counter(rejection.reason for index in indexes for rejection in index.rejected)
    opened = MixtureDataset(
        mixture, tokenizer, opened_sources.geometry, indexes, tokens, tiles, tokens != REJECTED, {}, {}
    )
    oversized = _fit_to_rows(opened, data, is_logging_rank)
    usable = opened.usable
    if not usable.any():
        reasons = ", ".join(f"{reason} {count}" for reason, count in refused.most_common()) or "no sample at all"
        raise DataError(
            f"the dataset is empty: none of {len(tokens)} samples of {', '.join(data.data_path)} is usable "
            f"({reasons}; {oversized['skipped']} longer than a row)"
        )
    if is_logging_rank and len(mixture.entries) > 1:
        table = describe_mixture(mixture, usable, tokens, tiles, recipe.training.seed)
        logger.info("the first epoch takes:\n%s", table)
    opened.counts = {
        "samples": len(tokens),
        "usable": int(usable.sum()),
        "refused": dict(refused),
        **oversized,
        "tokens_per_sample": float(tokens[usable].mean()),
        "tiles_per_sample": float(tiles[usable].mean()),
    }
    return opened


def _fit_to_rows(opened: MixtureDataset, data: DataConfig, is_logging_rank: bool) -> dict[str, int]:
    """Cut, skip or refuse what is longer than a row, as the settings say. Returns what was done, counted."""
    too_long = opened.usable & ((opened.tokens > data.seq_length) | (opened.tiles > data.max_tiles_per_row))
    oversized = np.flatnonzero(too_long)
    if not len(oversized):
        return {"skipped": 0, "cut": 0, "tokens_cut_off": 0}
    told = _name(opened, data, oversized)
    if data.oversized_samples == "error":
        raise DataError(f"{told}. Raise seq_length or max_tiles_per_row, or set oversized_samples to truncate or skip.")
    cut_off = _cut(opened, data) if data.oversized_samples == "truncate" else 0
    skipped = len(oversized) - len(opened.truncations)
    opened.usable[[number for number in oversized.tolist() if number not in opened.truncations]] = False
    if is_logging_rank:
        done = [f"{skipped} are skipped"] if skipped else []
        if opened.truncations:
            done.insert(0, f"{len(opened.truncations)} are cut after an answer, {cut_off} tokens are left out")
        logger.warning("%s; %s", told, ", ".join(done))
    return {"skipped": skipped, "cut": len(opened.truncations), "tokens_cut_off": cut_off}


def _name(opened: MixtureDataset, data: DataConfig, oversized: np.ndarray) -> str:
    named = []
    for number in oversized[:_NAMED].tolist():
        place, index = opened.mixture.sources.locate(number)
        sample = opened.mixture.sources.sources[place].metadata(index)
        named.append(f"{sample.id!r} of {sample.file} ({opened.tokens[number]} tokens, {opened.tiles[number]} tiles)")
    more = f" and {len(oversized) - _NAMED} more" if len(oversized) > _NAMED else ""
    return (
        f"{len(oversized)} samples are longer than a row of {data.seq_length} tokens and {data.max_tiles_per_row} "
        f"tiles: {', '.join(named)}{more}"
    )


def _cut(opened: MixtureDataset, data: DataConfig) -> int:
    """Replace lengths by those of what is kept. Returns the tokens that are left out."""
    starts, cut_off = opened.mixture.sources.starts, 0
    for start, source, index in zip(starts[:-1].tolist(), opened.mixture.sources.sources, opened.indexes, strict=True):
        cuts = load_truncations(
            source, index, opened.tokenizer, opened.geometry, data.seq_length, data.max_tiles_per_row
        )
        kept = cuts.turns > 0
        numbers = cuts.samples[kept] + start
        cut_off += int((opened.tokens[numbers] - cuts.tokens[kept]).sum())
        opened.tokens[numbers], opened.tiles[numbers] = cuts.tokens[kept], cuts.tiles[kept]
        pairs = zip(cuts.turns[kept].tolist(), cuts.tokens[kept].tolist(), strict=True)
        opened.truncations.update(zip(numbers.tolist(), pairs, strict=True))
    return cut_off


def open_plan_cache(recipe: Recipe, opened: MixtureDataset, inputs: dict[str, Any]) -> PlanCache:
    """The plans of all epochs, kept in the folder of the first source's length index under a name made of `inputs`."""
    data, seed = recipe.data, recipe.training.seed
    budget = Budget(data.seq_length, data.max_tiles_per_row, data.packing_window, row_cost(recipe))
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]

    def compute(epoch: int) -> EpochPlan:
        samples = opened.mixture.sample_epoch(opened.usable, seed, epoch)
        return plan_epoch(samples, opened.tokens, opened.tiles, budget, seed, epoch)

    folder = cache_folder(opened.mixture.sources.sources[0].name, data.cache_dir)
    return PlanCache(folder, key, compute)
