"""What our loader is measured against: each gives the tiles of the same shards, one pass through all of them.

pure limit              Pillow's decoding and resizing and a table look-up, in a bare loop; no files, no text
transformers            its LlavaNext image processor in torch's DataLoader; no text
mosaicml-streaming      its StreamingDataset and StreamingDataLoader around our own functions
"""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from megatron_vlm.data.processing.conversation import encode_conversation
from megatron_vlm.data.processing.image_io import decode_image
from megatron_vlm.data.processing.image_tokens import num_image_tokens
from megatron_vlm.data.processing.tiling import ImageGeometry, extract_tiles, normalise_tiles, select_best_resolution
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.data.shards.streaming_shim import import_streaming
from megatron_vlm.data.sources.annotations import parse_annotation

NORMALISED_AT_A_TIME = 8

Row = Sequence[bytes]
"""The image files of a row."""


class PureLimit:
    """The least that must be done to an image, with nothing around it: files and results stay where they are."""

    def __init__(self, geometry: ImageGeometry, most_tiles: int) -> None:
        self.geometry = geometry
        side = geometry.tile_size
        values = np.arange(256, dtype=np.float32) / np.float32(255)
        mean, std = np.asarray(geometry.mean, np.float32), np.asarray(geometry.std, np.float32)
        self.table = np.ascontiguousarray(((values[:, None] - mean) / std).T)
        self.tiles = np.empty((most_tiles, 3, side, side), np.float32)  # of one row after another

    def pass_through(self, rows: Sequence[Row]) -> Iterator[np.ndarray]:
        """[t, 3, P, P] float32 of each row, overwritten by the next."""
        for row in rows:
            count = 0
            for data in row:
                image = Image.open(io.BytesIO(data))  # all of them are RGB: a conversion would copy
                for view in self.views(image):
                    pixels = np.asarray(view)
                    for channel, table in enumerate(self.table):
                        np.take(table, pixels[:, :, channel], out=self.tiles[count, channel], mode="clip")
                    count += 1
            yield self.tiles[:count]

    def passes_through(self, rows: Sequence[Row], processes: int) -> Iterator[np.ndarray | range]:
        """The same; or, by several processes at once, each with its share of the rows, as many things as tiles."""
        if processes == 1:
            yield from self.pass_through(rows)
            return
        context = multiprocessing.get_context("fork")
        counts = context.SimpleQueue()
        started = [
            context.Process(
                target=lambda share: counts.put(sum(map(len, self.pass_through(share)))), args=(rows[n::processes],)
            )
            for n in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            yield range(counts.get())
            process.join()

    def views(self, image: Image.Image) -> Iterator[Image.Image]:
        """LLaVA-NeXT's anyres."""
        side = self.geometry.tile_size
        yield image.resize((side, side), Image.Resampling.BICUBIC)
        width, height = select_best_resolution(image.size, self.geometry.pinpoints)
        scale = min(width / image.width, height / image.height)
        size = min(ceil(image.width * scale), width), min(ceil(image.height * scale), height)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(image.resize(size, Image.Resampling.BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
        for top in range(0, height, side):
            for left in range(0, width, side):
                yield canvas.crop((left, top, left + side, top + side))


def normalised(pixels: torch.Tensor, geometry: ImageGeometry) -> Iterator[torch.Tensor]:
    """A row's tiles in float32, some at a time.

    Fresh memory for a row's tiles would be 80 MB, whose page faults take a CPU longer than the arithmetic. The limit
    has one piece of memory for all rows, a GPU a pool of it.
    """
    for part in pixels.split(NORMALISED_AT_A_TIME):
        yield normalise_tiles(part, geometry.mean, geometry.std)


def transformers_processor(geometry: ImageGeometry) -> LlavaNextImageProcessorPil:
    """With our grids, which it writes (height, width)."""
    side = geometry.tile_size
    return LlavaNextImageProcessorPil(
        image_grid_pinpoints=[[height, width] for width, height in geometry.pinpoints],
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
    )


class ProcessedImages(Dataset[torch.Tensor]):
    """Image files through transformers' processor, one by one: in a batch it would pad them to the most tiles."""

    def __init__(self, files: Sequence[bytes], geometry: ImageGeometry) -> None:
        self.files, self.processor = files, transformers_processor(geometry)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(self.files[index])).convert("RGB")
        tiles: torch.Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return tiles


def transformers_pass(images: ProcessedImages, workers: int) -> Iterator[torch.Tensor]:
    """[t, 3, P, P] float32 of each image."""
    options: dict[str, Any] = {"multiprocessing_context": "fork"} if workers else {}
    return iter(DataLoader(images, batch_size=None, collate_fn=_unchanged, num_workers=workers, **options))


def _unchanged(batch: Any) -> Any:
    return batch


def streamed_samples(folder: Path, tokenizer: Tokenizer, geometry: ImageGeometry, image_token: int, rows: int) -> Any:
    """A StreamingDataset of our shards whose samples are encoded and tiled by our functions.

    It holds locks from its first use on that no fork may inherit, and one process opens a folder once: for another
    number of workers take another one, and another name of the folder.

    Args:
        folder: of shards.
        tokenizer: as our loader's.
        geometry: as our loader's.
        image_token: fills the positions of an image.
        rows: our loader makes of these samples; batches hold as many samples as a row does.
    """
    streaming = import_streaming()

    class Samples(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            stored = super().__getitem__(index)
            bounds = pairwise([0, *accumulate(stored["image_lengths"])])
            images = [decode_image(stored["images"][start:stop]) for start, stop in bounds]
            turns = parse_annotation(stored["annotation"], index, str(folder)).turns
            positions = [num_image_tokens(image.size, geometry) for image in images]
            encoded = encode_conversation(turns, tokenizer, positions, image_token)
            side = geometry.tile_size
            tiles = [np.empty((0, 3, side, side), np.uint8), *(extract_tiles(image, geometry) for image in images)]
            return torch.from_numpy(encoded.ids), torch.from_numpy(encoded.labels), _joined(tiles)

    dataset = Samples(local=str(folder), shuffle=False, batch_size=1)
    dataset.batch_size = -(-len(dataset) // rows)
    return dataset


def _joined(tiles: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(tiles))


def streaming_pass(dataset: Any, geometry: ImageGeometry, workers: int) -> Iterator[torch.Tensor]:
    """[t, 3, P, P] float32 of each batch; pixels come from the workers and are normalised here, as with our loader."""
    options: dict[str, Any] = {"multiprocessing_context": "fork", "prefetch_factor": 2} if workers else {}
    loader = import_streaming().StreamingDataLoader(
        dataset, batch_size=dataset.batch_size, collate_fn=_laid_end_to_end, num_workers=workers, **options
    )
    for _, _, tiles in loader:
        yield from normalised(tiles, geometry)


def _laid_end_to_end(samples: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*samples, strict=True))
