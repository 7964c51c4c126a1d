"""A conversation longer than a row is truncated after an answer, with the images of the remaining questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data import truncation
from megatron_vlm.data.length_index import load_length_index
from megatron_vlm.data.loader import build_loader
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.data.rows.batch import IGNORE_INDEX
from megatron_vlm.data.sources.sample_source import AnnotationSource
from megatron_vlm.data.truncation import load_truncations
from tests.data.helpers import Folder, make_recipe, tiny_model, tiny_tokenizer_folder

LONG = "word " * 30


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    folder.add("short", "hi", "yes")
    folder.add("talk", *(text for i in range(9) for text in (f"Number {i}? {LONG}", f"It is {i}.")))
    images = [folder.image(f"{i}.png", 16, 16, seed=i) for i in range(6)]
    folder.add("album", *(text for i in range(6) for text in (f"<image>\nAnd {i}?", f"Shape {i}.")), image=images)
    folder.add("monster", LONG * 20, "yes", "And?", "no")
    tiny_tokenizer_folder(tmp_path / "tokenizer")
    folder.write()
    return folder


def read(folder: Folder, **settings: object) -> tuple[dict[str, str], dict[str, int], dict[str, object]]:
    """The supervised answers and the number of tiles of each sample, and the summary."""
    recipe = make_recipe(
        folder.root / "train.json", folder.images, folder.root / "tokenizer", oversized_samples="truncate",
        multi_image_aspect_ratio="same", **settings
    )  # fmt: skip
    loader = build_loader(recipe, dp_rank=0, dp_size=1, consumed_rows=0, need_tiles=True)
    tokenizer = load_tokenizer(folder.root / "tokenizer")
    answers, tiles = {}, {}
    for _ in range(loader.plan.rows):
        batch = next(loader)
        assert batch.tiles is not None and len(batch.tiles) == batch.num_tiles
        for name, start, stop in zip(batch.sample_ids, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            labels = batch.labels[start:stop]
            answers[name] = tokenizer.decode(labels[labels != IGNORE_INDEX].tolist())
            inside = (batch.feature_positions >= start) & (batch.feature_positions < stop)
            tiles[name] = len(set((batch.feature_sources[inside & (batch.feature_sources >= 0)] // 4).tolist()))
    return answers, tiles, loader.summary()


def test_no_answer_is_truncated(folder: Folder) -> None:
    answers, tiles, summary = read(folder)
    assert set(answers) == {"short", "talk", "album"}
    lines = answers["talk"].split("\n")[:-1]
    assert lines == [f"It is {i}." for i in range(len(lines))] and 0 < len(lines) < 9
    assert answers["album"] == "".join(f"Shape {i}.\n" for i in range(3))
    assert tiles["album"] == 15  # three images of five tiles each: a row holds at most 16 tiles
    assert (summary["usable"], summary["truncated"], summary["skipped"]) == (3, 2, 1)
    assert isinstance(summary["tokens_dropped"], int) and summary["tokens_dropped"] > 0


def test_a_system_turn_is_kept(folder: Folder) -> None:
    whole = read(folder)[0]["talk"]
    talk = folder.entries[1]["conversations"]
    folder.entries[1]["conversations"] = [{"from": "system", "value": "x"}, *talk]
    folder.write()
    answers = read(folder)[0]
    assert answers["talk"].startswith("It is 0.") and whole.startswith(answers["talk"])


def test_one_more_answer_would_not_fit(folder: Folder) -> None:
    tokenizer, geometry = load_tokenizer(folder.root / "tokenizer"), ImageGeometry.of(tiny_model(), "anyres")
    source = AnnotationSource(folder.root / "train.json", folder.images)
    index = load_length_index(source, tokenizer, geometry)
    whole = int(index.tokens[1])
    for seq_length in range(150, whole, 97):
        found = load_truncations(source, index, tokenizer, geometry, seq_length, 1000)
        [turns], [tokens] = found.turns[found.samples == 1].tolist(), found.tokens[found.samples == 1].tolist()
        assert tokens <= seq_length and turns % 2 == 0
        assert tokens + (whole - tokens) / (18 - turns) * 2 > seq_length - 20


def test_cached_beside_the_length_index(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(folder)
    monkeypatch.setattr(truncation, "parallel_map", lambda *args: pytest.fail("truncated again"))
    assert read(folder) == first
    damaged = next((folder.root / ".lengths").glob("*.cut-*"))
    damaged.write_bytes(b"nonsense")
    monkeypatch.undo()
    assert read(folder) == first


def test_nothing_to_truncate(folder: Folder) -> None:
    summary = read(folder, seq_length=8192, max_tiles_per_row=100)[2]
    assert (summary["usable"], summary["truncated"], summary["skipped"], summary["tokens_dropped"]) == (4, 0, 0, 0)
    assert np.isclose(float(str(summary["tokens_per_sample"])), 1000, rtol=1)
