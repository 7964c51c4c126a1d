"""Sample sources behind one interface: annotation files with image files, and shard folders. `open_source` has all."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.data.processing.image_io import ImageTooLarge, ImageUnreadable, measure_image, verify_image
from megatron_vlm.data.shards.cache import ShardCache
from megatron_vlm.data.shards.mds_format import ShardSample
from megatron_vlm.data.shards.reader import ShardFolder
from megatron_vlm.data.sources.annotation_file import AnnotationFile
from megatron_vlm.data.sources.annotations import is_url, parse_annotation


@dataclass
class Sample:
    """One conversation, with access to its images."""

    id: str
    file: str
    """Annotation file or shard folder, for error messages."""
    turns: list[Turn]
    image_names: list[str]
    """For error messages."""
    open_image: Callable[[int], BinaryIO]
    """Opens the i-th image file. Raises OSError."""
    image_sizes: list[tuple[int, int]] | None
    """Upright (width, height) of each image; None: they are not known without reading the images."""
    image_files: list[Path] = field(default_factory=list)
    """Files that images are read from, other than those of the source."""

    def read_image(self, index: int) -> bytes:
        """The bytes of an image file. Raises OSError."""
        with self.open_image(index) as file:
            return file.read()

    def measure_images(self, verify: bool = False) -> list[tuple[int, int]]:
        """Upright (width, height) of each image.

        Args:
            verify: decode images of unknown size; otherwise only their headers are read (see `measure_image`).

        Raises:
            SampleError: an image is missing or unreadable.
        """
        if self.image_sizes is not None:
            return self.image_sizes
        indices = range(len(self.image_names))
        return [self.load_image(index)[1] if verify else self._measure_image(index) for index in indices]

    def _measure_image(self, index: int) -> tuple[int, int]:
        with self._sample_errors(index), self.open_image(index) as file:
            return measure_image(file)

    def load_image(self, index: int) -> tuple[bytes, tuple[int, int]]:
        """The bytes and the upright (width, height) of an image. It is fully decoded to verify it.

        Raises:
            SampleError: the image is missing or unreadable.
        """
        with self._sample_errors(index):
            data = self.read_image(index)
            return data, verify_image(data)

    @contextmanager
    def _sample_errors(self, index: int) -> Iterator[None]:
        """Raise errors of reading an image as SampleError."""
        name = self.image_names[index]
        try:
            yield
        except FileNotFoundError as error:
            raise SampleError(
                self.id, self.file, "missing image", f"{name} does not exist", "Check image_folder and the path."
            ) from error
        except ImageTooLarge as error:
            raise SampleError(
                self.id, self.file, "image too large", f"{name}: {error}", "Use a smaller image or remove the entry."
            ) from error
        except ValueError as error:  # a NUL or a lone surrogate
            raise SampleError(
                self.id, self.file, "bad image path", f"{name!r} is not a valid file name", "Check the path."
            ) from error
        except (OSError, ImageUnreadable) as error:
            raise SampleError(
                self.id, self.file, "unreadable image", f"{name}: {error}", "Replace the image or remove the entry."
            ) from error


_DIGITS = 16
"""Of a hash that is compared between ranks."""
_QUICK_BYTES = 1 << 20


class SampleSource(ABC):
    """An indexed set of samples."""

    name: str
    """The file or folder."""
    shard_starts: np.ndarray | None = None
    """[shards + 1] int64: shard k holds samples [shard_starts[k], shard_starts[k + 1]); None: there are no shards."""

    @property
    def location(self) -> str:
        """A file or folder on this machine. What is computed from the source is kept beside it."""
        return self.name

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """Sample `index`. Its images are not read yet.

        Raises:
            SampleError: the annotation is invalid.
        """

    def metadata(self, index: int) -> Sample:
        """Sample `index` with what determines its lengths: turns and image sizes. Its images may be inaccessible.

        Raises:
            SampleError: the annotation is invalid.
        """
        return self.sample(index)

    @abstractmethod
    def content_hash(self) -> str:
        """sha256 of the annotations in hex. It is part of the cache key of the lengths."""

    def quick_hash(self) -> str:
        """Tells different annotations apart, with few exceptions, without reading them all; folders play no part."""
        return self.content_hash()[:_DIGITS]


class EntrySource(SampleSource):
    """A source whose samples are annotation entries, so that shards can be written from it."""

    @abstractmethod
    def entry(self, index: int) -> Any:
        """The annotation of sample `index` as parsed JSON, not validated.

        Raises:
            SampleError: it cannot be read.
        """


class AnnotationSource(EntrySource):
    """An annotation file and the root folder of its image paths."""

    def __init__(self, path: str | Path, image_folder: str | Path | None, cache_dir: str | Path | None = None) -> None:
        """
        Args:
            path: the annotation file.
            image_folder: root of its image paths; default: the working directory.
            cache_dir: where the offsets of its entries are kept, so that it is not scanned at every start; None: they
                are not.

        Raises:
            DataError: the file is not a valid annotation file, or `image_folder` does not exist.
        """
        self.name = str(path)
        self.image_folder = Path(image_folder) if image_folder else Path()
        if image_folder and not self.image_folder.is_dir():
            raise DataError(f"image_folder {self.image_folder} does not exist. Correct the path.")
        self._file = AnnotationFile(path, cache_dir)

    def __len__(self) -> int:
        return len(self._file)

    def entry(self, index: int) -> Any:
        return self._file.entry(index)

    def sample(self, index: int) -> Sample:
        annotation = parse_annotation(self.entry(index), index, self.name)
        for path in annotation.image_paths:
            if is_url(path):
                remedy = (
                    "Download it below the image folder and give its path (convert-dataset stores Base64 as files)."
                )
                raise SampleError(annotation.id, self.name, "image is a URL", path[:100], remedy)
        paths = [self.image_folder / path for path in annotation.image_paths]
        return Sample(
            id=annotation.id,
            file=self.name,
            turns=annotation.turns,
            image_names=[str(path) for path in paths],
            open_image=lambda i: paths[i].open("rb"),
            image_sizes=None if paths else [],
            image_files=paths,
        )

    def content_hash(self) -> str:
        parts = str(self.image_folder.resolve()), self._file.content_hash()
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def quick_hash(self) -> str:
        size = Path(self.name).stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(self.name, "rb") as file:
            for start in (0, size // 2, max(size - _QUICK_BYTES, 0)):
                file.seek(start)
                digest.update(file.read(_QUICK_BYTES))
        return digest.hexdigest()[:_DIGITS]


class ShardSource(SampleSource):
    """A shard folder. Shards that we wrote record image sizes, which are trusted: every image was decoded then."""

    def __init__(self, folder: str | Path, cache: ShardCache | None = None) -> None:
        """
        Args:
            folder: local folder or s3:// prefix.
            cache: for shards from S3.

        Raises:
            DataError: see `ShardFolder`.
        """
        self.name = str(folder)
        self._shards = ShardFolder(folder, cache)
        self.shard_starts = self._shards.starts

    def __len__(self) -> int:
        return len(self._shards)

    def sample(self, index: int) -> Sample:
        record = self._shards[index]
        sample = self._sample(record, index)
        if len(sample.image_names) != len(record.images):
            raise SampleError(
                sample.id, self.name, "image count mismatch",
                f"the annotation names {len(sample.image_names)} images, the shard has {len(record.images)}",
                "Write the shards again with megatron-vlm prepare-shards.",
            )  # fmt: skip
        return sample

    def metadata(self, index: int) -> Sample:
        return self._sample(self._shards.metadata(index), index)

    def _sample(self, record: ShardSample, index: int) -> Sample:
        annotation = parse_annotation(record.annotation, index, self.name)
        return Sample(
            id=annotation.id,
            file=self.name,
            turns=annotation.turns,
            image_names=annotation.image_paths,
            open_image=lambda i: io.BytesIO(record.images[i]),
            image_sizes=record.image_sizes,
        )

    def content_hash(self) -> str:
        return self._shards.content_hash


class SourceList:
    """Concatenated sources. A global sample number indexes the concatenation."""

    def __init__(self, sources: Sequence[SampleSource]) -> None:
        self.sources = list(sources)
        self.starts = np.concatenate([[0], np.cumsum([len(source) for source in sources], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, number: int) -> tuple[int, int]:
        """(index of the source, index of the sample in it) of a global sample number."""
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        return source, number - int(self.starts[source])

    def sample(self, number: int) -> Sample:
        source, index = self.locate(number)
        return self.sources[source].sample(index)
