"""Compares two sets of stored tensors name by name, with one pair in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from checkpoint_convert.mapping.hf_names import model_part
from checkpoint_convert.mapping.lazy_tensors import StoredTensors
from megatron_vlm.config import PARTS

OTHER = "other"
"""Report of the tensors that belong to no part of the model."""
_CHUNK = 2**22
"""Numbers that are compared at once: this bounds the memory needed beside the two tensors."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """How two tensors of one shape differ."""

    equal: bool
    """Whether all values are equal bit for bit, after conversion to the wider dtype."""
    largest: float
    """Largest absolute difference of two values; infinite if only one of them is nan."""
    rounded: bool
    """Whether the tensor of the narrower dtype is the other one, rounded."""


@dataclass
class PartReport:
    """Counts of one part of the model."""

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
    """Result of compare_tensors."""

    parts: dict[str, PartReport] = field(default_factory=lambda: {part: PartReport() for part in (*PARTS, OTHER)})
    differing: dict[str, float] = field(default_factory=dict)
    """Name -> largest difference, for tensors beyond the tolerance."""
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    """Names with both shapes, for tensors whose shapes differ."""
    dtypes: Counter[tuple[torch.dtype, torch.dtype]] = field(default_factory=Counter)
    rounded: int = 0
    """Number of unequal tensors of which one is the other, rounded to the narrower dtype."""

    @property
    def same_names_and_shapes(self) -> bool:
        return not (self.only_first or self.only_second or self.shapes)

    @property
    def same(self) -> bool:
        return self.same_names_and_shapes and not self.differing


def compare_tensors(
    first: StoredTensors, second: StoredTensors, names: Iterable[str], tolerance: float = 0.0
) -> Comparison:
    """Compare the tensors of these names.

    Args:
        first: tensors under the parameter map's Hugging Face names.
        second: tensors to compare them with.
        names: names in the order of reading.
        tolerance: largest accepted difference of two values; 0 compares bit for bit.
    """
    result = Comparison()
    for name in tqdm(list(names), unit="tensor", desc="comparing", disable=None):
        if name not in first or name not in second:
            (result.only_second if name in second else result.only_first).append(name)
        elif first.shape(name) != second.shape(name):
            result.shapes.append(f"{name}: {first.shape(name)} and {second.shape(name)}")
        else:
            _add_pair(result, name, first[name], second[name], tolerance)
    return result


def _add_pair(result: Comparison, name: str, first: torch.Tensor, second: torch.Tensor, tolerance: float) -> None:
    difference = compare_pair(first, second)
    part = result.parts[model_part(name) or OTHER]
    part.tensors += 1
    result.dtypes[first.dtype, second.dtype] += 1
    if difference.equal:
        part.equal += 1
        return
    result.rounded += difference.rounded
    if not part.worst or difference.largest > part.largest:
        part.largest, part.worst = difference.largest, name
    if tolerance > 0 and difference.largest <= tolerance:
        part.close += 1
    else:
        part.differ += 1
        result.differing[name] = difference.largest


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
        differences = (a - b).abs_().nan_to_num_(float("inf"))
        differences[a.isnan() & b.isnan()] = 0.0
        largest = max(largest, float(differences.max()))
        rounded = rounded and _same_bits(one.to(narrow), other.to(narrow))
    return Difference(equal, largest, rounded and not equal)


def _chunks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.reshape(-1).split(_CHUNK)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    bits = _BITS[first.dtype.itemsize]
    return torch.equal(first.view(bits), second.view(bits))
