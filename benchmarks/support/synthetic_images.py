"""Synthetic images of the kinds that data sets hold, with conversations about them, deterministic in a seed.

Photographs are sums of noise from coarse to fine. Their JPEG files have as many bytes per pixel as those of a camera,
and so the same decoding cost. Pages are lines of text. Charts are bars and curves with labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.support.random_tokenizer import write_tokenizer
from megatron_vlm.data.prepare.shard_writer import prepare_shards

Size = tuple[int, int]

_LETTERS = "etaoinshrdlu"
_OCTAVES = ((3, 70.0), (12, 45.0), (48, 25.0), (160, 12.0))
"""(cells along the longer side, amplitude of the noise)"""
_GRAIN = 4.0


def random_words(rng: np.random.Generator, count: int) -> str:
    """`count` random words."""
    letters = rng.choice(list(_LETTERS), (count, 8))
    return " ".join("".join(word[:length]) for word, length in zip(letters, rng.integers(2, 9, count), strict=True))


def photograph(rng: np.random.Generator, size: Size) -> Image.Image:
    """Smooth colour with detail at every scale and a little noise."""
    pixels = np.full((size[1], size[0], 3), 128, np.float32)
    for cells, amplitude in _OCTAVES:
        across, down = (max(2, cells * side // max(size)) for side in size)
        coarse = Image.fromarray(rng.integers(0, 256, (down, across, 3), dtype=np.uint8))
        pixels += (np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32) - 128) * (amplitude / 128)
    pixels += rng.normal(0, _GRAIN, (size[1], size[0], 1)).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def page(rng: np.random.Generator, size: Size) -> Image.Image:
    """Black text on white from edge to edge."""
    image = Image.new("RGB", size, "white")
    draw, height = ImageDraw.Draw(image), size[1] // 70
    font = ImageFont.load_default(height)
    for top in range(3 * height, size[1] - 3 * height, int(1.5 * height)):
        draw.text((3 * height, top), random_words(rng, 12), fill="black", font=font)
    return image


def chart(rng: np.random.Generator, size: Size) -> Image.Image:
    """Bars, a curve and labels."""
    image = Image.new("RGB", size, "white")
    draw, (width, height) = ImageDraw.Draw(image), size
    font, bars = ImageFont.load_default(height // 30), int(rng.integers(5, 15))
    draw.line([(60, 20), (60, height - 60), (width - 20, height - 60)], fill="black", width=2)
    for bar, value in enumerate(rng.uniform(0.1, 0.9, bars)):
        left, top = 80 + bar * (width - 120) // bars, int(height - 60 - value * (height - 100))
        colour = tuple(rng.integers(0, 256, 3).tolist())
        draw.rectangle((left, top, left + (width - 120) // bars - 10, height - 60), fill=colour)
        draw.text((left, height - 50), random_words(rng, 1), fill="black", font=font)
    curve = [(60 + x, int(height / 2 + y)) for x, y in enumerate(np.cumsum(rng.normal(0, 3, width - 100)))]
    draw.line(curve, fill="navy", width=3)
    return image


_KINDS: tuple[tuple[float, Callable[[np.random.Generator, Size], Image.Image], Size, str, dict[str, Any]], ...] = (
    (0.30, photograph, (640, 480), "jpg", {"quality": 92}),
    (0.15, photograph, (480, 640), "jpg", {"quality": 92}),
    (0.15, photograph, (1024, 768), "jpg", {"quality": 88}),
    (0.10, photograph, (1920, 1080), "jpg", {"quality": 85}),
    (0.08, page, (1654, 2339), "jpg", {"quality": 85}),
    (0.07, page, (1240, 1754), "png", {}),
    (0.15, chart, (800, 600), "png", {}),
)
"""(probability, function, (width, height), file type, options of Image.save)"""
TEXT_ONLY_FRACTION = 0.1


def write_images(folder: Path, samples: int, seed: int = 0) -> Path:
    """Write `samples` conversations into `folder`, and their images into `folder`/images; some have no image.

    Returns:
        The annotation file, `folder`/train.json.
    """
    rng = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True)
    entries = []
    kinds = rng.choice(len(_KINDS), samples, p=[kind[0] for kind in _KINDS])
    for number, kind in enumerate(kinds.tolist()):
        _, draw, size, suffix, options = _KINDS[kind]
        texts = [random_words(rng, int(rng.integers(5, 40))) for _ in range(2 * int(rng.integers(1, 5)))]
        entry: dict[str, Any] = {"id": str(number)}
        if rng.random() >= TEXT_ONLY_FRACTION:
            entry["image"] = f"{number}.{suffix}"
            draw(rng, size).save(images / entry["image"], **options)
            texts[0] = f"<image>\n{texts[0]}"
        entry["conversations"] = [
            {"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(texts)
        ]
        entries.append(entry)
    path = folder / "train.json"
    path.write_text(json.dumps(entries))
    return path


def write_image_shards(folder: Path, samples: int) -> tuple[Path, Path, int]:
    """Write such samples as MDS shards, and a tokenizer.

    Returns:
        Folder of the shards, folder of the tokenizer, vocabulary size.
    """
    prepare_shards([write_images(folder, samples)], folder / "images", folder / "shards")
    return folder / "shards", folder / "tokenizer", write_tokenizer(folder / "tokenizer")
