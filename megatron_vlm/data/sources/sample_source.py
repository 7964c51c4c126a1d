"""Where samples come from: annotation files with image files, or shard folders, behind one interface."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.data.processing.image_io import ImageTooLarge, ImageUnreadable, verify_image
from megatron_vlm.data.shards.cache import ShardCache
from megatron_vlm.data.shards.mds_format import INDEX, ShardSample
from megatron_vlm.data.shards.reader import ShardFolder
from megatron_vlm.data.shards.s3 import is_remote
from megatron_vlm.data.sources.annotations import AnnotationFile, parse_annotation


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
        return [self.load_image(place)[1] for place in range(len(self.image_names))]

    def load_image(self, place: int) -> tuple[bytes, tuple[int, int]]:
        """An image file and its upright (width, height), decoded whole to see that it is good.

        Raises:
            SampleError: it is missing or unreadable.
        """
        name = self.image_names[place]
        try:
            data = self.read_image(place)
            return data, verify_image(data)
        except FileNotFoundError as error:
            raise SampleError(
                self.id, self.file, "missing image", f"there is no {name}", "Check image_folder and the path."
            ) from error
        except ImageTooLarge as error:
            raise SampleError(
                self.id, self.file, "image too large", f"{name}: {error}", "Give a smaller one or remove the entry."
            ) from error
        except ValueError as error:  # a NUL, or half a surrogate pair
            raise SampleError(
                self.id, self.file, "bad image path", f"no file can have the name {name!r}", "Check the path."
            ) from error
        except (OSError, ImageUnreadable) as error:
            raise SampleError(
                self.id, self.file, "unreadable image", f"{name}: {error}", "Replace the image or remove the entry."
            ) from error


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

    def metadata(self, index: int) -> Sample:
        """As much of sample `index` as its lengths follow from; perhaps without a way to its images.

        Raises:
            SampleError: its annotation cannot be used.
        """
        return self.sample(index)

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
    """A folder of shards. Our own record image sizes, taken when every image was decoded, and these are relied on."""

    def __init__(self, folder: str | Path, cache: ShardCache | None = None) -> None:
        """
        Args:
            folder: of a disk, or s3://…
            cache: for shards of an S3 store.

        Raises:
            DataError: see `ShardFolder`.
        """
        self.name = str(folder)
        self._shards = ShardFolder(folder, cache)
        self.shard_starts = self._shards.starts

    def __len__(self) -> int:
        return len(self._shards)

    def sample(self, index: int) -> Sample:
        stored = self._shards[index]
        sample = self._sample(stored, index)
        if len(sample.image_names) != len(stored.images):
            raise SampleError(
                sample.id, self.name, "image count mismatch",
                f"the annotation names {len(sample.image_names)} images, the shard holds {len(stored.images)}",
                "Write the shards again with tools/prepare_shards.py.",
            )  # fmt: skip
        return sample

    def metadata(self, index: int) -> Sample:
        return self._sample(self._shards.metadata(index), index)

    def _sample(self, stored: ShardSample, index: int) -> Sample:
        annotation = parse_annotation(stored.annotation, index, self.name)
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


def open_source(path: str | Path, image_folder: str | Path | None, cache: ShardCache | None = None) -> SampleSource:
    """The source a path names: `.json` and `.jsonl` are annotations, a folder or s3:// is shards.

    Raises:
        DataError: there is nothing usable at `path`.
    """
    if is_remote(path):
        return ShardSource(str(path), cache)
    location = Path(path)
    if location.suffix in (".json", ".jsonl") and location.name != INDEX and not location.is_dir():
        return AnnotationSource(location, image_folder)
    if location.is_dir():
        return ShardSource(location)
    if location.exists():
        raise DataError(f"{location} is neither annotations (.json, .jsonl) nor a shard folder")
    raise DataError(f"{location} does not exist. Check data_path.")
