"""What the order of rows follows from, by name: a run that goes on sees whether it is still the same, and what is not.

Where data lies is not among it, nor what samples say: a set may be moved to another folder or store. Settings that only
share rows out (ranks, workers, rows per step) are not either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vlm.data.packing.epoch_plan import PLAN_VERSION
from megatron_vlm.data.packing.row_cost import row_cost

if TYPE_CHECKING:
    from megatron_vlm.config import Recipe
    from megatron_vlm.data.dataset import MixtureDataset

_DATA_SET = "data set"
_DIGITS = 16


def plan_inputs(recipe: Recipe, opened: MixtureDataset) -> dict[str, Any]:
    """Of the rows of a run; plain values, fit for JSON."""
    data, cost, mixture = recipe.data, row_cost(recipe), opened.mixture
    return {
        "version of the packing": PLAN_VERSION,
        "training.seed": recipe.training.seed,
        "data.seq_length": data.seq_length,
        "data.max_tiles_per_row": data.max_tiles_per_row,
        "data.packing_window": data.packing_window,
        "data.cost_per_token_squared": cost.per_token_squared,
        "data.cost_per_token": cost.per_token,
        "data.cost_per_tile": cost.per_tile,
        _DATA_SET: [_describe_source(opened, place) for place in range(len(mixture.sources.sources))],
        "use": [f"data set {place}, {rule}" for place, rule in mixture.entries],
    }


def _describe_source(opened: MixtureDataset, place: int) -> str:
    """How many samples, and a fingerprint of their lengths, of which can be used, and of their shards."""
    sources = opened.mixture.sources
    start, stop = sources.starts[place : place + 2].tolist()
    digest = hashlib.sha256()
    for values in (opened.tokens, opened.tiles, opened.usable):
        digest.update(np.ascontiguousarray(values[start:stop]).data)
    shard_starts = sources.sources[place].shard_starts
    if shard_starts is not None:
        digest.update(np.ascontiguousarray(shard_starts).data)
    usable = int(opened.usable[start:stop].sum())
    return f"{stop - start} samples, {usable} usable, of lengths {digest.hexdigest()[:_DIGITS]}"


def describe_changes(ours: dict[str, Any], theirs: dict[str, Any], names: Sequence[str]) -> list[str]:
    """What differs between two runs' inputs, an item for each; none where rows come in the same order.

    Args:
        ours: of this run.
        theirs: of the run that wrote the checkpoint.
        names: of this run's data sets.
    """
    changes = []
    for name in ours:
        here, there = ours[name], theirs.get(name)
        if here == there:
            continue
        if not isinstance(here, list) or not isinstance(there, list):
            changes.append(f"{name} is {here} here and was {there}")
        elif len(here) != len(there):
            changes.append(f"{len(here)} of {name} here and {len(there)} there")
        else:
            for place, (now, then) in enumerate(zip(here, there, strict=True)):
                if now != then:
                    label = names[place] if name == _DATA_SET else f"{name} {place}"
                    changes.append(f"{label} is {now} here and was {then}")
    return changes
