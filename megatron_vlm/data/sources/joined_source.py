"""Several sources that are one: a list in braces, or the files of a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.sources.sample_source import EntrySource, Sample, SampleSource, SourceList


class JoinedSource(EntrySource):
    """The samples of several sources, one after the other. A sampling rule counts all of them."""

    def __init__(self, name: str, parts: Sequence[SampleSource]) -> None:
        """
        Args:
            name: what the user calls them.
            parts: at least one.
        """
        self.name = name
        self._parts = SourceList(parts)
        starts = [part.shard_starts for part in parts]
        if all(start is not None for start in starts):  # shuffled by shard only if all have shards
            offsets = self._parts.starts[:-1]
            shifted = [start[:-1] + offset for start, offset in zip(starts, offsets, strict=True) if start is not None]
            self.shard_starts = np.concatenate([*shifted, self._parts.starts[-1:]])

    @property
    def location(self) -> str:
        return self._parts.sources[0].location

    def __len__(self) -> int:
        return len(self._parts)

    def entry(self, index: int) -> Any:
        part, inside = self._parts.locate(index)
        source = self._parts.sources[part]
        if not isinstance(source, EntrySource):
            raise DataError(f"{source.name} holds shards already. Leave it out.")
        return source.entry(inside)

    def sample(self, index: int) -> Sample:
        return self._parts.sample(index)

    def metadata(self, index: int) -> Sample:
        part, inside = self._parts.locate(index)
        return self._parts.sources[part].metadata(inside)

    def content_hash(self) -> str:
        hashes = "\n".join(source.content_hash() for source in self._parts.sources)
        return hashlib.sha256(hashes.encode()).hexdigest()

    def quick_hash(self) -> str:
        hashes = "\n".join(source.quick_hash() for source in self._parts.sources)
        return hashlib.sha256(hashes.encode()).hexdigest()[:16]
