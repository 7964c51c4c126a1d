"""What our loader is compared with. Each makes the tiles of the same shards, in one pass over all of them.

bare loop               Pillow decodes and resizes, a look-up table normalises; no file access, no text
transformers            its LlavaNext image processor in torch's DataLoader; no text
mosaicml-streaming      its StreamingDataset and StreamingDataLoader around our encoding and tiling
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

TILES_PER_CALL = 8

Row = Sequence[bytes]
"""The image files of a row."""


class BareLoop:
    """The minimum work per image: an upper bound for any loader. Files are in memory, results are overwritten."""

    def __init__(self, geometry: ImageGeometry, max_tiles: int) -> None:
        self.geometry = geometry
        side = geometry.tile_size
        values = np.arange(256, dtype=np.float32) / np.float32(255)
        mean, std = np.asarray(geometry.mean, np.float32), np.asarray(geometry.std, np.float32)
        self.table = np.ascontiguousarray(((values[:, None] - mean) / std).T)
        self.tiles = np.empty((max_tiles, 3, side, side), np.float32)  # reused for every row

    def run(self, rows: Sequence[Row]) -> Iterator[np.ndarray]:
        """Yield [t, 3, P, P] float32 for each row; the next row overwrites it."""
        for row in rows:
            count = 0
            for data in row:
                image = Image.open(io.BytesIO(data))  # all images are RGB, and convert() would copy
                for view in self.views(image):
                    pixels = np.asarray(view)
                    for channel, table in enumerate(self.table):
                        np.take(table, pixels[:, :, channel], out=self.tiles[count, channel], mode="clip")
                    count += 1
            yield self.tiles[:count]

    def run_parallel(self, rows: Sequence[Row], processes: int) -> Iterator[np.ndarray | range]:
        """Run with the rows split over processes; each process yields a range as long as its number of tiles."""
        if processes == 1:
            yield from self.run(rows)
            return
        context = multiprocessing.get_context("fork")
        counts = context.SimpleQueue()
        workers = [
            context.Process(target=lambda mine: counts.put(sum(map(len, self.run(mine)))), args=(rows[n::processes],))
            for n in range(processes)
        ]
        for process in workers:
            process.start()
        for process in workers:
            yield range(counts.get())
            process.join()

    def views(self, image: Image.Image) -> Iterator[Image.Image]:
        """The base view and the tiles of LLaVA-NeXT's anyres."""
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
    """A row's tiles in float32, TILES_PER_CALL at a time.

    All tiles of a row would need 80 MB of new memory, whose page faults cost a CPU more than the arithmetic. The bare
    loop reuses one buffer for all rows; a GPU has a memory pool.
    """
    for tiles in pixels.split(TILES_PER_CALL):
        yield normalise_tiles(tiles, geometry.mean, geometry.std)


def transformers_processor(geometry: ImageGeometry) -> LlavaNextImageProcessorPil:
    """transformers' processor with our pinpoints, which it stores as (height, width)."""
    side = geometry.tile_size
    return LlavaNextImageProcessorPil(
        image_grid_pinpoints=[[height, width] for width, height in geometry.pinpoints],
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
    )


class ProcessedImages(Dataset[torch.Tensor]):
    """Image files processed by transformers one by one; a batch would be padded to its largest tile count."""

    def __init__(self, files: Sequence[bytes], geometry: ImageGeometry) -> None:
        self.files, self.processor = files, transformers_processor(geometry)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(self.files[index])).convert("RGB")
        tiles: torch.Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return tiles


def transformers_pass(images: ProcessedImages, workers: int) -> Iterator[torch.Tensor]:
    """Yield [t, 3, P, P] float32 for each image."""
    options: dict[str, Any] = {"multiprocessing_context": "fork"} if workers else {}
    return iter(DataLoader(images, batch_size=None, collate_fn=_unchanged, num_workers=workers, **options))


def _unchanged(batch: Any) -> Any:
    return batch


def streamed_samples(folder: Path, tokenizer: Tokenizer, geometry: ImageGeometry, image_token: int, rows: int) -> Any:
    """A StreamingDataset of our shards whose samples are encoded and tiled by our functions.

    From its first use on it holds locks that no forked process may inherit, and a process can open a folder only once.
    So each number of workers needs its own dataset and its own name (link) of the folder.

    Args:
        folder: shards.
        tokenizer: the same as our loader's.
        geometry: the same as our loader's.
        image_token: id of image tokens.
        rows: number of rows of our loader; a batch holds as many samples as a row on average.
    """
    streaming = import_streaming()

    class Samples(streaming.StreamingDataset):  # type: ignore[misc, name-defined]
        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            stored = super().__getitem__(index)
            bounds = pairwise([0, *accumulate(stored["image_lengths"])])
            images = [decode_image(stored["images"][start:stop]) for start, stop in bounds]
            turns = parse_annotation(stored["annotation"], index, str(folder)).turns
            image_tokens = [num_image_tokens(image.size, geometry) for image in images]
            encoded = encode_conversation(turns, tokenizer, image_tokens, image_token)
            side = geometry.tile_size
            tiles = [np.empty((0, 3, side, side), np.uint8), *(extract_tiles(image, geometry) for image in images)]
            pixels = torch.from_numpy(np.concatenate(tiles))
            return torch.from_numpy(encoded.ids), torch.from_numpy(encoded.labels), pixels

    dataset = Samples(local=str(folder), shuffle=False, batch_size=1)
    dataset.batch_size = -(-len(dataset) // rows)
    return dataset


def streaming_pass(dataset: Any, geometry: ImageGeometry, workers: int) -> Iterator[torch.Tensor]:
    """Yield float32 tiles. Workers send uint8 pixels, which this process normalises, as with our loader."""
    options: dict[str, Any] = {"multiprocessing_context": "fork", "prefetch_factor": 2} if workers else {}
    loader = import_streaming().StreamingDataLoader(
        dataset, batch_size=dataset.batch_size, collate_fn=_concatenate, num_workers=workers, **options
    )
    for _, _, tiles in loader:
        yield from normalised(tiles, geometry)


def _concatenate(samples: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*samples, strict=True))
