"""WebDataset tars as a source of samples: `000.jpg` with `000.json` (an annotation entry) or `000.txt` (a caption).

The images of a sample are its image files, in the order in which the entry names them, or else in that of the tar.
Without a conversation in a `.json`, the text of a `.txt` answers a question that is the image alone, as in
LLaVA's pretraining.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_vlm.data.errors import SampleError
from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER
from megatron_vlm.data.sources.annotations import CONVERSATION_KEYS, parse_annotation
from megatron_vlm.data.sources.containers.tar_index import IMAGE_ENDINGS, Member, TarIndex
from megatron_vlm.data.sources.sample_source import EntrySource, Sample


class TarSource(EntrySource):
    """The samples of one tar."""

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None) -> None:
        """
        Args:
            path: of the tar.
            cache_dir: where the offsets of its files are kept; None: the tar is scanned at every start.

        Raises:
            DataError: see `TarIndex`.
        """
        self.name = str(path)
        self._index = TarIndex(Path(path), Path(cache_dir) if cache_dir else None)

    def __len__(self) -> int:
        return len(self._index)

    def entry(self, index: int) -> Any:
        return self._read_entry(index)[0]

    def sample(self, index: int) -> Sample:
        entry, images = self._read_entry(index)
        annotation = parse_annotation(entry, index, self.name)
        return Sample(
            id=annotation.id,
            file=self.name,
            turns=annotation.turns,
            image_names=annotation.image_paths,
            open_image=lambda i: self._open(images[i]),
            image_sizes=None if annotation.image_paths else [],
        )

    def content_hash(self) -> str:
        return self._index.content_hash

    def _read_entry(self, index: int) -> tuple[Any, list[Member]]:
        """The annotation entry, with the names of its images in the tar, and those images.

        Raises:
            SampleError: a text is not JSON or not UTF-8.
        """
        members = self._index.members(index)
        texts = {member.ending: member for member in members if member.ending not in IMAGE_ENDINGS}
        images = [member for member in members if member.ending in IMAGE_ENDINGS]
        key = members[0].name.rpartition("/")[2].partition(".")[0]
        entry: Any = {}
        if "json" in texts:
            try:
                entry = json.loads(self._read(texts["json"]))
            except (ValueError, RecursionError) as error:
                raise SampleError(key, self.name, "not JSON", f"{texts['json'].name}: {error}", "Fix it.") from error
            if not isinstance(entry, dict):
                return entry, images  # parse_annotation says what is wrong
        if "txt" in texts and not any(entry.get(name) is not None for name in CONVERSATION_KEYS):
            entry = {"conversations": self._caption(texts["txt"], len(images), key)}
        images = _in_named_order(images, entry.get("image", entry.get("images")))
        entry = {"id": key, **{name: value for name, value in entry.items() if name not in ("image", "images")}}
        if images:
            names = [member.name for member in images]
            entry["image"] = names if len(names) > 1 else names[0]
        return entry, images

    def _caption(self, text: Member, num_images: int, key: str) -> list[dict[str, str]]:
        try:
            caption = self._read(text).decode()
        except UnicodeDecodeError as error:
            raise SampleError(key, self.name, "no text", f"{text.name}: {error}", "Save it as UTF-8.") from None
        question = "\n".join([IMAGE_PLACEHOLDER] * num_images)
        return [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]

    def _read(self, member: Member) -> bytes:
        with self._open(member) as file:
            return file.read()

    def _open(self, member: Member) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Slice(self.name, member.offset, member.size)))


def _in_named_order(images: list[Member], named: Any) -> list[Member]:
    """The images as the entry names them, if it names files of the tar; else all of them in the order of the tar."""
    found = {image.name.rpartition("/")[2]: image for image in images}
    paths = named if isinstance(named, list) else [named]
    names = [str(path).rpartition("/")[2] for path in paths]
    return [found[name] for name in names] if all(name in found for name in names) else images


class _Slice(io.RawIOBase):
    """A part of a file, read where it is needed: of an image that is only measured, that is its header."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = max(min(len(buffer), self._size - self._position), 0)
        data = os.pread(self._descriptor, wanted, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
