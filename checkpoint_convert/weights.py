"""Tensors in a Hugging Face folder: read without loading what is not asked for, written in shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.names import canonical_name

SHARD_BYTES = 5 * 2**30


class FolderTensors(Mapping[str, torch.Tensor]):
    """The tensors of a folder under the name map's names, read one at a time.

    `dialect` is the kind of folder: "whole", "vision" or "language" (names.py).
    """

    def __init__(self, folder: Path, dialect: str) -> None:
        self.folder = folder
        self._files: dict[str, tuple[Any, str]] = {}
        for file in _weight_files(folder):
            for name, where in _open(file).items():
                canonical = canonical_name(name, dialect)
                if canonical is None:
                    continue
                if canonical in self._files:
                    raise ConversionError(f"{folder} holds {canonical} twice (again in {file.name} as {name})")
                self._files[canonical] = (where, name)

    def __getitem__(self, name: str) -> torch.Tensor:
        where, stored = self._files[name]
        tensor: torch.Tensor = where.get_tensor(stored) if hasattr(where, "get_tensor") else where[stored]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def discard(self, name: str) -> None:
        """Leave a tensor out: the output weight of a model whose config ties it to the embedding."""
        self._files.pop(name, None)


def _weight_files(folder: Path) -> list[Path]:
    """safetensors first, as transformers does; a `.bin` only where there are none (openai's CLIP is published so)."""
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / index).exists():
            names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
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
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return dict.fromkeys(loaded, loaded)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ConversionError(f"{file} cannot be read ({error}); is it complete? Download or copy it again") from error


def write_weights(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model.safetensors`, or numbered shards of at most `shard_bytes` with an index, as transformers does."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    metadata = {"format": "pt"}  # transformers 4 refuses a file that does not say so
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata=metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata=metadata)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
