"""Weights in a Hugging Face folder: read lazily, one tensor at a time, and written in shards."""

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
from checkpoint_convert.mapping.hf_names import NameFormat, canonical_name
from checkpoint_convert.mapping.lazy_tensors import StoredTensors

SHARD_BYTES = 5 * 2**30
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class FolderTensors(StoredTensors):
    """The tensors of a folder, or of a single file, under the parameter map's Hugging Face names."""

    _entries: dict[str, tuple[Any, str]]
    """Name -> the open file and the tensor's name in it."""

    def __init__(self, folder: Path, format: NameFormat) -> None:
        """Raises ConversionError if a file is missing or damaged, or holds a tensor twice."""
        self._entries = {}
        for file in _weight_files(folder):
            for stored, opened in _open(file).items():
                name = canonical_name(stored, format)
                if name is None:
                    continue
                if name in self._entries:
                    raise ConversionError(f"{folder} holds {name} twice (again in {file.name} as {stored})")
                self._entries[name] = (opened, stored)

    def __getitem__(self, name: str) -> torch.Tensor:
        opened, stored = self._entries[name]
        tensor: torch.Tensor = opened.get_tensor(stored) if hasattr(opened, "get_tensor") else opened[stored]
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        opened, stored = self._entries[name]
        return tuple(opened.get_slice(stored).get_shape() if hasattr(opened, "get_slice") else opened[stored].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self[name].dtype  # files are memory-mapped: this reads nothing

    def discard(self, name: str) -> None:
        """Ignore a tensor: the output weight of a model whose config ties it to the embedding."""
        self._entries.pop(name, None)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files, else the `.bin` files, as in transformers; OpenAI's CLIP has only `.bin`."""
    if folder.is_file():
        return [folder]
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / index).exists():
            try:
                weight_map = json.loads((folder / index).read_text())["weight_map"]
                names = sorted({Path(file).as_posix() for file in weight_map.values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConversionError(
                    f"{folder / index} cannot be read ({error}): download or copy it again"
                ) from error
            absent = [name for name in names if not (folder / name).exists()]
            if absent:
                raise ConversionError(
                    f"{folder / index} names files that are not there: {', '.join(absent)}. Download or copy them"
                )
            return [folder / name for name in names]
        if (folder / single).exists():
            return [folder / single]
    raise ConversionError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index. "
        "Download the folder again"
    )


def _open(file: Path) -> dict[str, Any]:
    """Tensor name -> the open file, an object that returns the tensor."""
    try:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
            return dict.fromkeys(opened.keys(), opened)
        # files of torch before 1.6 are not zip archives and cannot be memory-mapped
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError:  # its message explains how to run the code inside, which nobody should
        raise ConversionError(
            f"{file} is not a file of weights, or holds more than plain tensors. Download or copy it again"
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise ConversionError(f"{file} cannot be read ({error}); is it complete? Download or copy it again") from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise ConversionError(f"{file} does not hold named tensors only: is it a file of weights?")
    return dict.fromkeys(loaded, loaded)


def write_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    plan: Sequence[TensorSpec] | None = None,
) -> None:
    """Write `model.safetensors`, or numbered shards of at most `shard_bytes` with an index, as transformers does.

    Args:
        tensors: (name, tensor); with a `plan`, only one at a time is in memory.
        folder: an existing folder.
        shard_bytes: a larger tensor gets its own shard.
        plan: names, shapes and dtypes of the tensors, in order; by default from the tensors, which are all read first.

    Raises:
        ConversionError: the disk has too little space, or float16 cannot hold a value.
    """
    if plan is None:
        tensors = list(tensors)
        plan = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
    shards: list[list[TensorSpec]] = [[]]
    for tensor in plan:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    total, remaining = sum(tensor.nbytes for tensor in plan), iter(tensors)
    check_space(folder, total)
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="writing", disable=None) as bar:
        for number, shard in enumerate(shards, start=1):
            several = len(shards) > 1
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if several else "model.safetensors"
            _write_file(folder / file, shard, remaining, bar)
            weight_map.update({tensor.name: file for tensor in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(path: Path, plan: list[TensorSpec], tensors: Iterator[tuple[str, torch.Tensor]], bar: Any) -> None:
    """One safetensors file (https://github.com/huggingface/safetensors#format): the header, then each tensor's bytes.

    The writer of the safetensors package needs all tensors in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers 4 requires it
    end = 0
    for tensor in plan:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for planned in plan:
            name, value = next(tensors)
            assert (name, tuple(value.shape)) == (planned.name, planned.shape)
            _check_range(name, value, planned.dtype)
            file.write(value.to(planned.dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
            bar.update(planned.nbytes)


def _check_range(name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    """float16 ends at 65,504; a larger value would silently become infinite."""
    if dtype != torch.float16 or value.dtype == dtype:
        return
    largest, limit = float(value.abs().max()), torch.finfo(dtype).max
    if largest > limit:
        raise ConversionError(f"{name} holds {largest:g}, and float16 ends at {limit:g}: export as bfloat16 or float32")
