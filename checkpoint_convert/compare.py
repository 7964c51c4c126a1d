"""Two sets of stored tensors, compared name by name with one pair in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from checkpoint_convert.mapping.lazy_tensors import StoredTensors
from checkpoint_convert.model_source import PARTS

OTHER = "other"
_CHUNK = 2**22
"""Numbers that are compared at once: what this needs beside the two tensors."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """How two tensors of one shape differ."""

    equal: bool
    """Every value agrees in every bit, after widening where the dtypes differ."""
    largest: float
    """Of the values' differences; infinite where one is nan and the other not."""
    rounded: bool
    """The narrower tensor is the wider one rounded to its dtype."""


@dataclass
class PartReport:
    """What was found in one part of the model."""

    tensors: int = 0
    equal: int = 0
    close: int = 0
    """Not equal, but within the tolerance."""
    differ: int = 0
    largest: float = 0.0
    worst: str = ""
    """The tensor with the largest difference."""


@dataclass
class Comparison:
    """What was found."""

    parts: dict[str, PartReport] = field(default_factory=lambda: {part: PartReport() for part in (*PARTS, OTHER)})
    differing: dict[str, float] = field(default_factory=dict)
    """Name -> largest difference, of those beyond the tolerance."""
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    """Names with both shapes, where they differ."""
    dtypes: Counter[tuple[torch.dtype, torch.dtype]] = field(default_factory=Counter)
    rounded: int = 0
    """Of the tensors that are not equal, those that rounding to the narrower dtype explains."""

    @property
    def same_names_and_shapes(self) -> bool:
        return not (self.only_first or self.only_second or self.shapes)

    @property
    def same(self) -> bool:
        return self.same_names_and_shapes and not self.differing


def compare_tensors(
    first: StoredTensors, second: StoredTensors, names: Iterable[str], tolerance: float = 0.0
) -> Comparison:
    """Compare the tensors that either side has among `names`.

    Args:
        first: tensors under the Hugging Face names of the name map, as `second`.
        second: the others.
        names: in the order in which they are best read.
        tolerance: of a difference between two numbers; 0: bit for bit.
    """
    found = Comparison()
    for name in tqdm(list(names), unit="tensor", desc="comparing", disable=None):
        if name not in first or name not in second:
            (found.only_second if name in second else found.only_first).append(name)
        elif first.shape(name) != second.shape(name):
            found.shapes.append(f"{name}: {first.shape(name)} and {second.shape(name)}")
        else:
            _note(found, name, first[name], second[name], tolerance)
    return found


def _note(found: Comparison, name: str, first: torch.Tensor, second: torch.Tensor, tolerance: float) -> None:
    difference = compare_pair(first, second)
    part = found.parts[part_of(name)]
    part.tensors += 1
    found.dtypes[first.dtype, second.dtype] += 1
    if difference.equal:
        part.equal += 1
        return
    found.rounded += difference.rounded
    if not part.worst or difference.largest > part.largest:
        part.largest, part.worst = difference.largest, name
    if tolerance > 0 and difference.largest <= tolerance:
        part.close += 1
    else:
        part.differ += 1
        found.differing[name] = difference.largest


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to; OTHER where it has no place in one."""
    return next((part for part, beginnings in PARTS.items() if name.startswith(beginnings)), OTHER)


def compare_pair(first: torch.Tensor, second: torch.Tensor) -> Difference:
    """Compare two tensors of one shape."""
    wide = torch.promote_types(first.dtype, second.dtype)
    narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    equal, rounded, largest = True, first.dtype != second.dtype, 0.0
    for one, other in zip(_chunks(first), _chunks(second), strict=True):
        a, b = one.to(wide), other.to(wide)
        if _same_bits(a, b):
            continue
        equal = False
        apart = (a - b).abs_().nan_to_num_(float("inf"))
        apart[a.isnan() & b.isnan()] = 0.0
        largest = max(largest, float(apart.max()))
        rounded = rounded and _same_bits(one.to(narrow), other.to(narrow))
    return Difference(equal, largest, rounded and not equal)


def _chunks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.reshape(-1).split(_CHUNK)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    bits = _BITS[first.dtype.itemsize]
    return torch.equal(first.view(bits), second.view(bits))
