"""Tars, Parquet files and saved datasets yield the samples of the same annotations; damaged ones one message."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.length_index import load_length_index
from megatron_vlm.data.loader import build_loader
from megatron_vlm.data.prepare.shard_writer import prepare_shards
from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.data.processing.tiling import ImageGeometry
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.data.sources.containers import columnar_file, columnar_source, tar_index
from megatron_vlm.data.sources.containers.columnar_file import ColumnarFile
from megatron_vlm.data.sources.open_source import open_source
from tests.data.helpers import Folder, image_bytes, make_recipe, mixed_folder, tiny_model, tiny_tokenizer_folder
from tests.data.sources.packed_files import add_file, table_of, write_parquet, write_saved_dataset, write_tar
from tests.data.sources.same_samples import assert_same_samples

SAMPLES = 10


def _one_file(folder: Folder) -> Path:
    return write_parquet(folder, folder.root / "data.parquet")


def _parquet_folder(folder: Folder) -> Path:
    target = folder.root / "hub" / "data"
    target.mkdir(parents=True)
    write_parquet(folder, target / "train-0.parquet", rows=slice(5))
    write_parquet(folder, target / "train-1.parquet", rows=slice(5, None))
    return folder.root / "hub"


def _tars(folder: Folder) -> Path:
    write_tar(folder, folder.root / "t_00.tar", slice(6))
    write_tar(folder, folder.root / "t_01.tar", slice(6, None))
    return folder.root / "t_{00..01}.tar"


KINDS: dict[str, Callable[[Folder], Path]] = {
    "parquet": _one_file,
    "folder of parquet": _parquet_folder,
    "tar": lambda folder: write_tar(folder, folder.root / "data.tar"),
    "tars": _tars,
    "saved dataset": lambda folder: write_saved_dataset(folder, folder.root / "saved"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_annotations(tmp_path: Path, kind: str) -> None:
    """Also their lengths, and the shards that are written from them."""
    folder = mixed_folder(tmp_path, SAMPLES)
    path, plain = KINDS[kind](folder), open_source(folder.write(), folder.images)
    source = open_source(path, None)
    assert_same_samples(source, plain)
    assert_same_samples(open_source(path, None), plain)  # from the cache
    tokenizer = load_tokenizer(tiny_tokenizer_folder(tmp_path / "tokenizer"))
    geometry = ImageGeometry.of(tiny_model(), "anyres")
    found, expected = (load_length_index(s, tokenizer, geometry, processes=1) for s in (source, plain))
    assert all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in ("tokens", "tiles", "sizes"))
    summary = prepare_shards([path], None, tmp_path / "shards", processes=1)
    assert (summary.read, summary.written) == (SAMPLES, SAMPLES)
    assert_same_samples(open_source(tmp_path / "shards", None), plain)
    assert not list(tmp_path.glob("*{*/")), "no folder with braces is made"


def test_one_image_per_row(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for number in range(4):
        image = {"image": folder.image(f"{number}.png", 5 + number, 6)} if number else {}
        folder.add(str(number), "<image>" * len(image) + "What?", "This.", **image)
    path = write_parquet(folder, tmp_path / "data.parquet", several=False)
    assert_same_samples(open_source(path, None), open_source(folder.write(), folder.images))


def test_paths_in_place_of_bytes(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder = Folder(tmp_path)
    folder.add("a", "<image>What?", "This.", image=folder.image("a.png", 5, 6))
    folder.add("b", "<image>What?", "This.", image="gone.png")
    table = pyarrow.table({"id": ["a", "b"], "image": ["a.png", "gone.png"],
                           "messages": [entry["conversations"] for entry in folder.entries]})  # fmt: skip
    parquet.write_table(table, tmp_path / "data.parquet")
    source = open_source(tmp_path / "data.parquet", folder.images)
    assert source.sample(0).measure_images() == [(5, 6)]
    with pytest.raises(SampleError, match=r"'b' of .*data\.parquet: missing image: .*gone\.png"):
        source.sample(1).measure_images()


def test_captions_and_the_order_of_images_in_a_tar(tmp_path: Path) -> None:
    one, two = image_bytes(4, 5), image_bytes(6, 7, seed=1)
    entry = b'{"image": ["x/b.png", "x/a.png"], "messages": [{"user": "<image><image>?", "assistant": "yes"}]}'
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in [("s/1.jpg", one), ("s/1.txt", "A dög.".encode()), ("s/1.cls", b"3"),
                              ("s/2.a.png", one), ("s/2.b.png", two), ("s/2.json", entry),
                              ("s/3.json", entry.replace(b"x/", b"2.")), ("s/3.2.a.png", one), ("s/3.2.b.png", two),
                              ("s/4.txt", b"\xff"), ("s/5.json", b"{"), ("s/6.json", b"[]")]:  # fmt: skip
            add_file(tar, name, content)
    source = open_source(tmp_path / "a.tar", None)
    assert len(source) == 6
    assert source.sample(0).turns == [Turn("human", "<image>"), Turn("gpt", "A dög.")]
    assert source.sample(0).measure_images() == [(4, 5)]
    assert source.sample(1).measure_images() == [(4, 5), (6, 7)], "names of no file in the tar: its order"
    for index, reason in [(3, "no text"), (4, "not JSON"), (5, "not an entry")]:
        with pytest.raises(SampleError, match=r"a\.tar") as caught:
            source.sample(index)
        assert caught.value.reason == reason


def test_damaged_files_end_in_one_message(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder = mixed_folder(tmp_path, 6)
    tar, table = write_tar(folder, tmp_path / "x.tar"), write_parquet(folder, tmp_path / "x.parquet")
    saved = write_saved_dataset(folder, tmp_path / "saved")
    whole_tar, whole_table = tar.read_bytes(), table.read_bytes()
    end = len(whole_tar.rstrip(b"\0"))
    header = whole_tar.index(b"part/s3.json")
    cases: list[tuple[Path, bytes, str]] = [
        (tar, whole_tar[: end - 100], "not a whole tar file: unexpected end of data"),
        (tar, whole_tar[:header], "truncated or damaged"),
        (tar, whole_tar[: header + 100], "truncated or damaged"),
        (tar, whole_tar[: header + 10] + b"?" + whole_tar[header + 11 :], "truncated or damaged"),
        (tar, whole_tar + whole_tar, "concatenated"),
        (tar, b"nonsense" * 1000, "not a whole tar file"),
        (tar, bytes(10240), "has no sample"),
        (table, whole_table[:-50], "not a whole parquet file"),
        (table, whole_table[:100], "not a whole parquet file"),
        (table, b"", "not a whole parquet file"),
        (saved / "data-00001-of-00002.arrow", b"nonsense", "not a whole arrow file"),
    ]
    for path, content, message in cases:
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{path.name}.*{message}"):
            open_source(saved if path.suffix == ".arrow" else path, None)
    parquet.write_table(pyarrow.table({"question": ["a"], "picture": [b"x"]}), table)
    with pytest.raises(DataError, match=r"columns question, picture, and none of conversations and messages\. Convert"):
        open_source(table, None)
    (saved / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json is damaged"):
        open_source(saved, None)
    (tmp_path / "both").mkdir()
    (tmp_path / "both/a.tar").touch()
    (tmp_path / "both/a.parquet").touch()
    with pytest.raises(DataError, match=r"holds \.parquet and \.tar files"):
        open_source(tmp_path / "both", None)
    with pytest.raises(DataError, match=r"x\.tar\.gz is neither annotations"):
        tar.rename(tmp_path / "x.tar.gz")
        open_source(tmp_path / "x.tar.gz", None)


def test_a_damaged_row_group_and_a_wrong_cell_are_named(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder = mixed_folder(tmp_path, 9)
    path = write_parquet(folder, tmp_path / "x.parquet")
    start = parquet.ParquetFile(path).metadata.row_group(2).column(1).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    source = open_source(path, None)
    assert source.sample(0).id == "s0"
    with pytest.raises(DataError, match=r"x\.parquet is damaged in row group 2"):
        source.sample(8)
    table = table_of(folder).drop(["images"]).append_column("image", pyarrow.array([7] * 9))
    parquet.write_table(table, path)
    with pytest.raises(SampleError, match=r"'s0' of .*x\.parquet: bad image path: image 0 is 7"):
        open_source(path, None).sample(0)


def test_large_row_groups_are_for_prepare_shards_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(mixed_folder(tmp_path, 6), tmp_path / "x.parquet")
    monkeypatch.setattr(columnar_source, "MAX_GROUP_BYTES", 100)
    with pytest.raises(DataError, match=r"x\.parquet has row groups .*prepare-shards"):
        open_source(path, None)
    assert prepare_shards([path], None, tmp_path / "shards", processes=1).written == 6


def test_row_groups_of_all_files_share_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mixed_folder(tmp_path, 12)
    source, plain = open_source(_parquet_folder(folder), None), open_source(folder.write(), folder.images)
    groups, one = columnar_file._GroupCache(), ColumnarFile(tmp_path / "hub/data/train-0.parquet")
    monkeypatch.setattr(columnar_file, "_groups", groups)
    monkeypatch.setattr(columnar_file, "_CACHE_BYTES", one._group(0, tuple(one.columns)).nbytes * 2)
    assert_same_samples(source, plain)
    assert 1 <= len(groups._tables) <= 3 and groups._bytes == sum(table.nbytes for table in groups._tables.values())
    with monkeypatch.context() as patch:
        patch.setattr(ColumnarFile, "_read_group", lambda *args: pytest.fail("read again"))
        source.sample(11)
    monkeypatch.setattr(columnar_file, "_CACHE_BYTES", 0)
    assert source.sample(0).id == "s0" and len(groups._tables) == 1


def test_files_are_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mixed_folder(tmp_path, 6)
    paths = [write_tar(folder, tmp_path / "x.tar"), write_parquet(folder, tmp_path / "x.parquet")]
    before = [open_source(path, None).content_hash() for path in paths]
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_scan", lambda path: pytest.fail("scanned again"))
        patch.setattr(ColumnarFile, "digest", lambda *args: pytest.fail("hashed again"))
        assert [open_source(path, None).content_hash() for path in paths] == before
    folder.entries[0]["conversations"][1]["value"] += "!"
    write_tar(folder, paths[0])
    write_parquet(folder, paths[1])
    after = [open_source(path, None).content_hash() for path in paths]
    assert all(new != old for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_of_all_kinds_resumes_exactly(tmp_path: Path, workers: int) -> None:
    """One run over annotations, MDS shards, Parquet and a tar, each with its own rule."""
    folder = mixed_folder(tmp_path, SAMPLES)
    json_path = folder.write()
    prepare_shards([json_path], folder.images, tmp_path / "shards", processes=1)
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        f"datasets:\n- json_path: {json_path}\n- shard_path: {tmp_path / 'shards'}\n  repeat: 2\n"
        f"- shard_path: {_parquet_folder(folder)}\n  sampling_strategy: random:50%\n- shard_path: {_tars(folder)}\n"
        f"  choose: 15\n- json_path: {_one_file(folder)}\n  sampling_strategy: first:3\n"
    )
    recipe = make_recipe(mixture, folder.images, tiny_tokenizer_folder(tmp_path / "tok"), num_workers=workers)

    def rows(consumed: int, count: int) -> list[tuple[list[int], list[int]]]:
        loader = build_loader(recipe, dp_rank=0, dp_size=1, consumed_rows=consumed, need_tiles=True)
        taken = [next(loader) for _ in range(count)]
        loader.close()
        return [(row.tokens.tolist(), [] if row.tiles is None else row.tiles.flatten().tolist()) for row in taken]

    full = rows(0, 14)
    assert rows(9, 5) == full[9:]
    assert any(tiles for _, tiles in full)
