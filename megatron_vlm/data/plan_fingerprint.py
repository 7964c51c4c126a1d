"""What determines the order of rows. A resumed run compares it with the checkpoint's and reports every difference.

The location of the data and the content of samples are not part of it, so a dataset may be moved to another folder or
store. Settings that only distribute rows (ranks, workers, rows per step) are not part of it either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vlm.data.errors import ChangedOrderError
from megatron_vlm.data.packing.epoch_plan import PLAN_VERSION
from megatron_vlm.data.packing.row_cost import row_cost

if TYPE_CHECKING:
    from megatron_vlm.config import Recipe
    from megatron_vlm.data.dataset import MixtureDataset

# Keys and values are stored in checkpoints: rewording one would reject every older checkpoint.
_SOURCES, _ENTRIES = "data set", "use"
_LABELS = {_SOURCES: "datasets", _ENTRIES: "mixture entries"}
_DIGITS = 16


def plan_inputs(recipe: Recipe, dataset: MixtureDataset) -> dict[str, Any]:
    """What determines the order of rows, by name; plain values that JSON can hold."""
    data, cost, mixture = recipe.data, row_cost(recipe), dataset.mixture
    return {
        "version of the packing": PLAN_VERSION,
        "training.seed": recipe.training.seed,
        "data.seq_length": data.seq_length,
        "data.max_tiles_per_row": data.max_tiles_per_row,
        "data.packing_window": data.packing_window,
        "data.cost_per_token_squared": cost.per_token_squared,
        "data.cost_per_token": cost.per_token,
        "data.cost_per_tile": cost.per_tile,
        _SOURCES: [_describe_source(dataset, source) for source in range(len(mixture.sources.sources))],
        _ENTRIES: [f"data set {source}, {rule}" for source, rule in mixture.entries],
    }


def _describe_source(dataset: MixtureDataset, source: int) -> str:
    """Number of samples, number of usable ones, and a hash of their lengths, of `usable` and of the shard sizes."""
    sources = dataset.mixture.sources
    start, stop = sources.starts[source : source + 2].tolist()
    digest = hashlib.sha256()
    for values in (dataset.tokens, dataset.tiles, dataset.usable):
        digest.update(np.ascontiguousarray(values[start:stop]).data)
    shard_starts = sources.sources[source].shard_starts
    if shard_starts is not None:
        digest.update(np.ascontiguousarray(shard_starts).data)
    usable = int(dataset.usable[start:stop].sum())
    return f"{stop - start} samples, {usable} usable, of lengths {digest.hexdigest()[:_DIGITS]}"


def describe_changes(current: dict[str, Any], saved: dict[str, Any], source_names: Sequence[str]) -> list[str]:
    """The differences between two runs' inputs, one per item; empty if both see the rows in the same order.

    Args:
        current: inputs of this run.
        saved: inputs of the run that wrote the checkpoint.
        source_names: file or folder of each of this run's sources.
    """
    changes = []
    for name, new in current.items():
        old, label = saved.get(name), _LABELS.get(name, name)
        if new == old:
            continue
        if not isinstance(new, list) or not isinstance(old, list):
            changes.append(f"{label} is {new} (was {old})")
        elif len(new) != len(old):
            changes.append(f"the number of {label} is {len(new)} (was {len(old)})")
        else:
            for index, (new_item, old_item) in enumerate(zip(new, old, strict=True)):
                if new_item != old_item:
                    item = source_names[index] if name == _SOURCES else f"mixture entry {index}"
                    changes.append(f"{item} is {new_item} (was {old_item})")
    return changes


def check_order(
    current: dict[str, Any], saved: dict[str, Any], source_names: Sequence[str], *, iteration: int, allow_changes: bool
) -> list[str]:
    """Check that a resumed run has the order of rows of its checkpoint.

    `iteration` is the checkpoint's; the other arguments and the returned changes are those of describe_changes.

    Raises:
        ChangedOrderError: there are changes and `allow_changes` is False.
    """
    changes = describe_changes(current, saved, source_names)
    if changes and not allow_changes:
        raise ChangedOrderError(
            f"the order of samples is not that of the checkpoint (iteration {iteration}): {'; '.join(changes)}. "
            "Resuming would repeat some samples of the epoch and leave out others. Restore what changed; or start a "
            "new stage with --pretrained-checkpoint and another --save; or accept the new order with "
            "--allow-changed-order."
        )
    return changes
