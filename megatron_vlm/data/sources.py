"""Where samples come from: annotation files with image files, or shard folders, behind one interface."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.annotations import AnnotationFile, parse_annotation
from megatron_vlm.data.conversation import Turn
from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.images import ImageUnreadable, verify_image
from megatron_vlm.data.shards import INDEX, ShardFolder


@dataclass
class Sample:
    """One conversation and the way to its images."""

    id: str
    file: str
    """Annotation file or shard folder; for messages."""
    turns: list[Turn]
    image_names: list[str]
    """For messages."""
    read_image: Callable[[int], bytes]
    """Bytes of the image file by its place; raises OSError."""
    image_sizes: list[tuple[int, int]] | None
    """Upright (width, height), where they are known without reading the images."""

    def measure_images(self) -> list[tuple[int, int]]:
        """Upright (width, height) of each image; images of unknown size are read and decoded whole.

        Raises:
            SampleError: an image is missing or unreadable.
        """
        if self.image_sizes is not None:
            return self.image_sizes
        sizes = []
        for place, name in enumerate(self.image_names):
            try:
                sizes.append(verify_image(self.read_image(place)))
            except FileNotFoundError as error:
                raise SampleError(
                    self.id, self.file, "missing image", f"there is no {name}", "Check image_folder and the path."
                ) from error
            except (OSError, ImageUnreadable) as error:
                raise SampleError(
                    self.id, self.file, "unreadable image", f"{name}: {error}", "Replace the image or remove the entry."
                ) from error
        return sizes


class SampleSource(ABC):
    """A numbered set of samples."""

    name: str
    """The file or folder."""
    shard_starts: np.ndarray | None = None
    """[shards + 1] int64: shard k holds the samples shard_starts[k] to shard_starts[k + 1]; None: no shards."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """Read sample `index`, its images not yet.

        Raises:
            SampleError: its annotation cannot be used.
        """

    @abstractmethod
    def content_hash(self) -> str:
        """sha256, hex, of the annotations: what cached lengths are kept under."""


class AnnotationSource(SampleSource):
    """An annotation file and the folder its image paths start from."""

    def __init__(self, path: str | Path, image_folder: str | Path | None) -> None:
        """
        Raises:
            DataError: the file cannot be read as annotations, or `image_folder` is no folder.
        """
        self.name = str(path)
        self.image_folder = Path(image_folder) if image_folder else Path()
        if image_folder and not self.image_folder.is_dir():
            raise DataError(f"image_folder {self.image_folder} does not exist")
        self._file = AnnotationFile(path)

    def __len__(self) -> int:
        return len(self._file)

    def entry(self, index: int) -> dict[str, Any]:
        """The annotation as written."""
        return self._file.entry(index)

    def sample(self, index: int) -> Sample:
        annotation = parse_annotation(self.entry(index), index, self.name)
        paths = [self.image_folder / path for path in annotation.image_paths]
        return Sample(
            id=annotation.id,
            file=self.name,
            turns=annotation.turns,
            image_names=[str(path) for path in paths],
            read_image=lambda place: paths[place].read_bytes(),
            image_sizes=None if paths else [],
        )

    def content_hash(self) -> str:
        digest = hashlib.sha256(str(self.image_folder.resolve()).encode())
        with open(self.name, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        return digest.hexdigest()


class ShardSource(SampleSource):
    """A folder of shards. Its images were decoded when it was written, so their recorded sizes are relied on."""

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            DataError: see `ShardFolder`.
        """
        self.name = str(folder)
        self._shards = ShardFolder(folder)
        self.shard_starts = self._shards.starts

    def __len__(self) -> int:
        return len(self._shards)

    def sample(self, index: int) -> Sample:
        stored = self._shards[index]
        annotation = parse_annotation(stored.annotation, index, self.name)
        if len(annotation.image_paths) != len(stored.images):
            raise SampleError(
                annotation.id, self.name, "image count mismatch",
                f"the annotation names {len(annotation.image_paths)} images, the shard holds {len(stored.images)}",
                "Write the shards again with tools/prepare_shards.py.",
            )  # fmt: skip
        return Sample(
            id=annotation.id,
            file=self.name,
            turns=annotation.turns,
            image_names=annotation.image_paths,
            read_image=stored.images.__getitem__,
            image_sizes=stored.image_sizes,
        )

    def content_hash(self) -> str:
        return self._shards.content_hash


class SourceList:
    """Several sources numbered through: what a global sample number means."""

    def __init__(self, sources: Sequence[SampleSource]) -> None:
        self.sources = list(sources)
        self.starts = np.concatenate([[0], np.cumsum([len(source) for source in sources], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, number: int) -> tuple[int, int]:
        """(source, index in it) of a global sample number."""
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        return source, number - int(self.starts[source])

    def sample(self, number: int) -> Sample:
        source, index = self.locate(number)
        return self.sources[source].sample(index)


def open_source(path: str | Path, image_folder: str | Path | None) -> SampleSource:
    """The source a path names: `.json` and `.jsonl` are annotations, a folder is shards.

    Raises:
        DataError: there is nothing usable at `path`.
    """
    location = Path(path)
    if location.suffix in (".json", ".jsonl") and location.name != INDEX and not location.is_dir():
        return AnnotationSource(location, image_folder)
    if location.is_dir():
        return ShardSource(location)
    if location.exists():
        raise DataError(f"{location} is neither annotations (.json, .jsonl) nor a shard folder")
    raise DataError(f"{location} does not exist. Check data_path.")
