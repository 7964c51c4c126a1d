"""Tensors in a Hugging Face folder: read without loading what is not asked for, written in shards."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.folder import check_space
from checkpoint_convert.mapping.hf_names import canonical_name
from checkpoint_convert.mapping.lazy_tensors import StoredTensors

SHARD_BYTES = 5 * 2**30


_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class FolderTensors(StoredTensors):
    """The tensors of a folder under the name map's names, read one at a time.

    `dialect` is the kind of folder: "whole", "vision" or "language" (names.py). A single file is read as well.
    """

    def __init__(self, folder: Path, dialect: str) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Any, str]] = {}
        for file in _weight_files(folder):
            for name, where in _open(file).items():
                canonical = canonical_name(name, dialect)
                if canonical is None:
                    continue
                if canonical in self._places:
                    raise ConversionError(f"{folder} holds {canonical} twice (again in {file.name} as {name})")
                self._places[canonical] = (where, name)

    def __getitem__(self, name: str) -> torch.Tensor:
        where, stored = self._places[name]
        tensor: torch.Tensor = where.get_tensor(stored) if hasattr(where, "get_tensor") else where[stored]
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        where, stored = self._places[name]
        return tuple(where.get_slice(stored).get_shape() if hasattr(where, "get_slice") else where[stored].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self[name].dtype  # files are mapped: this reads nothing

    def discard(self, name: str) -> None:
        """Leave a tensor out: the output weight of a model whose config ties it to the embedding."""
        self._places.pop(name, None)


def _weight_files(folder: Path) -> list[Path]:
    """safetensors first, as transformers does; a `.bin` only where there are none (openai's CLIP is published so)."""
    if folder.is_file():
        return [folder]
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / index).exists():
            try:
                names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConversionError(
                    f"{folder / index} cannot be read ({error}): download or copy it again"
                ) from error
            absent = [name for name in names if not (folder / name).exists()]
            if absent:
                raise ConversionError(f"{folder / index} names files that are not there: {', '.join(absent)}")
            return [folder / name for name in names]
        if (folder / single).exists():
            return [folder / single]
    raise ConversionError(f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index")


def _open(file: Path) -> dict[str, Any]:
    """Stored name -> what its tensor is got from."""
    try:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
            return dict.fromkeys(opened.keys(), opened)
        # files of torch before 1.6 are no archives and cannot be mapped
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError:  # its message explains how to run what is inside, which nobody should
        raise ConversionError(f"{file} is no file of weights, or has more than plain tensors in it") from None
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise ConversionError(f"{file} cannot be read ({error}); is it complete? Download or copy it again") from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise ConversionError(f"{file} holds something else than named tensors: is it a file of weights?")
    return dict.fromkeys(loaded, loaded)


def write_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    plan: Sequence[Planned] | None = None,
) -> None:
    """Write `model.safetensors`, or numbered shards of at most `shard_bytes` with an index, as transformers does.

    Args:
        tensors: (name, tensor), asked for one at a time where there is a `plan`.
        folder: where to write; it exists.
        shard_bytes: a tensor that is larger gets a shard of its own.
        plan: what will come, in order; without it, all tensors are taken first.
    """
    if plan is None:
        tensors = list(tensors)
        plan = [Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
    shards: list[list[Planned]] = [[]]
    for tensor in plan:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    total, coming = sum(tensor.nbytes for tensor in plan), iter(tensors)
    check_space(folder, total)
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="writing", disable=None) as bar:
        for number, shard in enumerate(shards, start=1):
            several = len(shards) > 1
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if several else "model.safetensors"
            _write_file(folder / file, shard, coming, bar)
            weight_map.update({tensor.name: file for tensor in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(path: Path, plan: list[Planned], coming: Iterator[tuple[str, torch.Tensor]], bar: Any) -> None:
    """One safetensors file (https://github.com/huggingface/safetensors#format): the header, then each tensor's bytes.

    safetensors' own writer wants all tensors at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers 4 refuses a file that does not say so
    end = 0
    for tensor in plan:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for planned in plan:
            name, value = next(coming)
            assert (name, tuple(value.shape)) == (planned.name, planned.shape)
            _check_range(name, value, planned.dtype)
            file.write(value.to(planned.dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
            bar.update(planned.nbytes)


def _check_range(name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    """Half precision ends at 65,504; what is beyond would become infinite without a word."""
    if dtype != torch.float16 or value.dtype == dtype:
        return
    largest, limit = float(value.abs().max()), torch.finfo(dtype).max
    if largest > limit:
        raise ConversionError(f"{name} holds {largest:g}, and float16 ends at {limit:g}: export as bfloat16 or float32")
