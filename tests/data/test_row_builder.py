"""Data that changed since its lengths were measured is an error that names the sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data.errors import RowError
from megatron_vlm.data.length_index import load_length_index
from megatron_vlm.data.packing.row_plan import PlannedRow
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.data.rows.row_builder import RowBuilder
from megatron_vlm.data.sources.sample_source import AnnotationSource, SourceList
from tests.data.helpers import Folder, image_bytes, mixed_folder, tiny_model, tiny_tokenizer_folder

ROW = PlannedRow(17, 0, np.array([5, 3]))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return mixed_folder(tmp_path, 8)


@pytest.fixture
def builder(folder: Folder) -> RowBuilder:
    tokenizer = load_tokenizer(tiny_tokenizer_folder(folder.root / "tokenizer"))
    geometry = ImageGeometry.of(tiny_model(), "anyres")
    source = AnnotationSource(folder.write(), folder.images)
    index = load_length_index(source, tokenizer, geometry)
    return RowBuilder(SourceList([source]), [index], tokenizer, geometry, 500, 300, (0, 1))


def test_samples_keep_their_order(builder: RowBuilder) -> None:
    assert builder.build(ROW).sample_ids == ["s5", "s3"]


@pytest.mark.parametrize("damage", ["gone", "broken", "truncated", "resized"])
def test_a_damaged_image(folder: Folder, builder: RowBuilder, damage: str) -> None:
    path = folder.images / "5_0.png"
    data = path.read_bytes()
    contents = {"broken": b"nonsense", "truncated": data[: len(data) // 2], "resized": image_bytes(99, 98)}
    path.unlink()
    if damage in contents:
        path.write_bytes(contents[damage])
    with pytest.raises(RowError, match=r"row 17: sample 's5' of .*train\.json: image .*5_0\.png"):
        builder.build(ROW)
    builder.tile_shard = None  # a rank that decodes no image does not notice; one that does ends the run
    assert builder.build(ROW).tiles is None


def test_the_error_of_a_resized_image_says_how_to_measure_again(folder: Folder, builder: RowBuilder) -> None:
    (folder.images / "5_0.png").write_bytes(image_bytes(29, 3))
    file = builder.indexes[0].file
    with pytest.raises(RowError, match=f"is 29x3 pixels, but was .* remove {file}"):
        builder.build(ROW)
    file.unlink()
    builder.indexes = [load_length_index(builder.sources.sources[0], builder.tokenizer, builder.geometry)]
    assert builder.build(ROW).sample_ids == ["s5", "s3"]


def test_a_changed_annotation(folder: Folder, builder: RowBuilder) -> None:
    folder.entries[5]["conversations"][1]["value"] = "A longer answer."
    builder.sources = SourceList([AnnotationSource(folder.write(), folder.images)])
    with pytest.raises(RowError, match=r"row 17: sample 's5' .* tokens, but \d+ when it was measured"):
        builder.build(ROW)
    folder.entries[5]["conversations"][1]["value"] = ""
    builder.sources = SourceList([AnnotationSource(folder.write(), folder.images)])
    with pytest.raises(RowError, match="row 17: sample 5 of .* can no longer be read: .*empty answer"):
        builder.build(ROW)
