"""From a planned row to a batch: samples are read, encoded, laid out; the images whose tiles are wanted are decoded.

Every image was decoded once, when its shard was written or its lengths were measured, and refused if that failed. So
an image that cannot be decoded now has been damaged or replaced since. That ends the run with an error that names it,
rather than putting something in its place: only the ranks of the first stage decode, the ranks that know the labels
do not, and nobody would learn that the model was shown something else. After the file is mended, the run goes on from
its last checkpoint with exactly the rows that were still to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from megatron_vlm.data.batch import Document, PackedBatch, assemble_row, tile_range
from megatron_vlm.data.errors import DataError, RowError
from megatron_vlm.data.length_index import LengthIndex
from megatron_vlm.data.packing.row_plan import PlannedRow
from megatron_vlm.data.processing.conversation import encode_conversation
from megatron_vlm.data.processing.image_io import ImageUnreadable, decode_image
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, extract_tiles_into, num_image_tiles
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.data.sources.sample_source import Sample, SourceList
from megatron_vlm.data.truncation import count_images


@dataclass
class RowBuilder:
    """Builds the batches of one rank."""

    sources: SourceList
    indexes: list[LengthIndex]
    """One for each source."""
    tokenizer: Tokenizer
    geometry: ImageGeometry
    image_token_index: int
    seq_length: int
    tile_shard: tuple[int, int] | None
    """(member, members) among the ranks that encode a row's tiles; None: this rank decodes no image."""
    truncations: dict[int, tuple[int, int]] = field(default_factory=dict)
    """(turns that are kept, their tokens) of the samples that are cut, by number."""

    def build(self, row: PlannedRow) -> PackedBatch:
        """
        Raises:
            RowError: a sample cannot be read any more, or is not what it was when its length was measured.
        """
        samples, documents = [], []
        for number in row.members.tolist():
            sample, document = self._read(row, number)
            samples.append(sample)
            documents.append(document)
        batch = assemble_row(documents, self.seq_length, self.tokenizer.pad_id, self.geometry)
        batch.row_index = row.row_index
        if self.tile_shard is not None:
            batch.tiles = self._tiles(row, samples, documents, *tile_range(batch.num_tiles, *self.tile_shard))
        return batch

    def _read(self, row: PlannedRow, number: int) -> tuple[Sample, Document]:
        place, index = self.sources.locate(number)
        source, lengths = self.sources.sources[place], self.indexes[place]
        try:
            sample = source.sample(index)
        except (DataError, OSError) as error:
            raise RowError(
                f"row {row.row_index}: sample {index} of {source.name} cannot be read any more: {error}"
            ) from error
        turns, sizes, expected = sample.turns, lengths.image_sizes(index), int(lengths.tokens[index])
        if number in self.truncations:
            kept, expected = self.truncations[number]
            turns = turns[:kept]
            sizes = sizes[: count_images(turns)]
        positions = [num_image_tokens(size, self.geometry) for size in sizes]
        encoded = encode_conversation(turns, self.tokenizer, positions, self.image_token_index)
        if len(encoded.ids) != expected:
            raise RowError(
                f"row {row.row_index}: sample {sample.id!r} of {sample.file} has {len(encoded.ids)} tokens where "
                f"{expected} were measured: the data changed. Start again from the checkpoint."
            )
        return sample, Document(sample.id, encoded, sizes)

    def _tiles(
        self, row: PlannedRow, samples: Sequence[Sample], documents: Sequence[Document], start: int, stop: int
    ) -> torch.Tensor:
        """Tiles [start, stop) of the row, [n, 3, P, P] uint8; images without any of them are not read."""
        side = self.geometry.tile_size
        pixels = np.empty((stop - start, 3, side, side), np.uint8)  # numpy's, for it asks for huge pages
        first = 0
        for sample, document in zip(samples, documents, strict=True):
            for place, size in enumerate(document.image_sizes):
                last = first + num_image_tiles(size, self.geometry)
                begin, end = max(start, first), min(stop, last)
                if begin < end:
                    image = self._decode(row, sample, place, size)
                    extract_tiles_into(pixels[begin - start : end - start], image, self.geometry, begin - first)
                first = last
        return torch.from_numpy(pixels)

    def _decode(self, row: PlannedRow, sample: Sample, place: int, size: tuple[int, int]) -> Image.Image:
        where = f"row {row.row_index}: sample {sample.id!r} of {sample.file}: image {sample.image_names[place]}"
        try:
            image = decode_image(sample.read_image(place))
        except (OSError, ImageUnreadable) as error:
            raise RowError(
                f"{where} could be read when the data was measured and now cannot: {error}. "
                "Put the image back and start again from the checkpoint."
            ) from error
        if image.size != size:
            measured = next(
                index.file
                for source, index in zip(self.sources.sources, self.indexes, strict=True)
                if source.name == sample.file
            )
            raise RowError(
                f"{where} is {image.width}x{image.height} pixels, was {size[0]}x{size[1]} when the data was measured. "
                "Put the image back, give the changed one another name, or have the lengths of all "
                f"samples measured anew: remove {measured}."
            )
        return image
