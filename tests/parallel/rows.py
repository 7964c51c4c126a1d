"""Rows for the layout tests: with and without images, with several turns, without supervised tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_vlm.config import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    TrainingConfig,
    VisionConfig,
)
from megatron_vlm.data.rows.batch import IGNORE_INDEX, PackedBatch, tile_range

SEQ_LENGTH, VOCAB_SIZE, IMAGE_TOKEN = 96, 256, 250

_VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 15,
    "patch_size": 5,
}  # fmt: skip
_LANGUAGE: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": VOCAB_SIZE, "max_position_embeddings": SEQ_LENGTH,
}  # fmt: skip
_SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model", "class_token": False, "pre_norm": False, "patch_bias": True,
    "pooling_head": True, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
_QWEN2: dict[str, Any] = {
    "model_type": "qwen2", "normalization": "RMSNorm", "attention_bias": True, "num_key_value_heads": 1,
}  # fmt: skip
_MISTRAL: dict[str, Any] = {
    "model_type": "mistral", "normalization": "RMSNorm", "head_dim": 10, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip-olmo": ({}, {}),
    "siglip-qwen2": (_SIGLIP, _QWEN2),
    "clip-mistral": ({}, _MISTRAL),
}
"""Settings of vision tower and language model in each model family that differ from the first one's."""


ROWS = ("mixed", "text", "unsupervised")
"""With and without images and supervised tokens; text only; no supervised token at all in steps of 8 rows but one."""


def tiny_recipe(parallel: ParallelConfig, family: str = "clip-olmo", **training: Any) -> Recipe:
    """The smallest model with every part of the real one; sizes are odd where parallelism allows it."""
    of_vision, of_language = FAMILIES[family]
    vision, language = VisionConfig(**(_VISION | of_vision)), LanguageConfig(**(_LANGUAGE | of_language))
    return Recipe(
        model=ModelConfig(vision, language, image_token_index=IMAGE_TOKEN, image_grid_pinpoints=[[15, 15], [30, 15]]),
        data=DataConfig(seq_length=SEQ_LENGTH),
        training=TrainingConfig(
            **{"global_batch_size": 8, **training},
            lr=1e-3,
            lr_warmup_fraction=0.0,
            lr_decay_style="constant",
        ),
        parallel=parallel,
    )


def _documents(generator: torch.Generator) -> list[int]:
    """Document lengths of a row, which leave 0 to 8 tokens of padding."""
    lengths, left = [], SEQ_LENGTH - int(torch.randint(0, 9, (), generator=generator))
    while left > 0:
        length = min(left, int(torch.randint(7, 45, (), generator=generator)))
        lengths.append(length)
        left -= length
    return lengths


def make_row(index: int, kind: str = "mixed") -> PackedBatch:
    """Row `index` of the fixed, infinite sequence of this kind (see ROWS), with all of its tiles."""
    generator = torch.Generator().manual_seed(1000 + index)
    vision = tiny_recipe(ParallelConfig()).model.vision
    tokens = torch.randint(0, IMAGE_TOKEN, (SEQ_LENGTH,), generator=generator)
    labels = torch.full((SEQ_LENGTH,), IGNORE_INDEX)
    positions = torch.zeros(SEQ_LENGTH, dtype=torch.long)
    cu_seqlens, where, sources, tiles = [0], [], [], 0
    with_images, with_labels = index % 4 != 1, index % 5 != 3
    if kind == "text":
        with_images = False
    elif kind == "unsupervised":
        with_labels = index // 8 == 1  # the second of three steps, so that the other two have an optimizer to disturb
    for length in _documents(generator):
        start, end = cu_seqlens[-1], cu_seqlens[-1] + length
        positions[start:end] = torch.arange(length)
        answers = torch.rand(length - 1, generator=generator) < 0.4  # several supervised spans, like turns
        if with_labels:
            labels[start : end - 1][answers] = tokens[start + 1 : end][answers]
        room = length - 3
        if with_images and room > vision.patches_per_tile:
            count = min(room, vision.patches_per_tile + 4)
            span = torch.arange(start + 1, start + 1 + count)
            where.append(span)
            first = tiles * vision.patches_per_tile
            features = first + torch.randperm(2 * vision.patches_per_tile, generator=generator)[:count].sort()[0]
            features[vision.patches_per_tile // 2] = -1  # one newline
            sources.append(features)
            tokens[span] = IMAGE_TOKEN
            tiles += 2
        cu_seqlens.append(end)
    if cu_seqlens[-1] < SEQ_LENGTH:
        positions[cu_seqlens[-1] :] = torch.arange(SEQ_LENGTH - cu_seqlens[-1])
        cu_seqlens.append(SEQ_LENGTH)
    none = torch.zeros(0, dtype=torch.long)
    return PackedBatch(
        tokens=tokens,
        labels=labels,
        positions=positions,
        cu_seqlens=cu_seqlens,
        feature_positions=torch.cat(where) if where else none,
        feature_sources=torch.cat(sources) if sources else none,
        num_tiles=tiles,
        tiles=torch.randint(
            256, (tiles, 3, vision.image_size, vision.image_size), dtype=torch.uint8, generator=generator
        ),
        datasets=[document % 2 for document in range(len(cu_seqlens) - 1)],
        num_tokens=cu_seqlens[-2] if cu_seqlens[-1] == SEQ_LENGTH else SEQ_LENGTH,
    )


def rows_of(
    data_rank: int, data_size: int, tile_shard: tuple[int, int] | None, kind: str = "mixed"
) -> Iterator[PackedBatch]:
    """The rows of a data rank, with the tiles of shard `tile_shard` = (rank, size)."""
    index = data_rank
    while True:
        row = make_row(index, kind)
        if tile_shard is None:
            row.tiles = None
        else:
            assert row.tiles is not None
            start, stop = tile_range(row.num_tiles, *tile_shard)
            row.tiles = row.tiles[start:stop]
        yield row
        index += data_size
