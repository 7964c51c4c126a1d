"""The one way to open data: what is at a path decides which source reads it.

| path | read by |
|---|---|
| `.json`, `.json_new`, `.jsonl`, `.ndjson`, each also with `.gz` | `AnnotationSource` |
| `.parquet`, `.arrow` | `ColumnarSource` |
| `.tar` | `TarSource` (WebDataset) |
| a folder with `index.json`, `s3://…` | `ShardSource` |
| another folder | its `.parquet`, `.tar` or `.arrow` files (the last as `save_to_disk` writes them), as one source |
| `hf://datasets/…` | the same, after `hub.download` |
| a path with `{a,b}`, `{00..15}` or `*` | the files that it stands for, as one source |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.config.file_lists import expand_path
from megatron_vlm.data.array_files import cache_folder
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.shards.cache import ShardCache
from megatron_vlm.data.shards.mds_format import INDEX
from megatron_vlm.data.shards.s3 import is_remote
from megatron_vlm.data.sources.annotation_file import SUFFIXES, is_annotation_file
from megatron_vlm.data.sources.containers.columnar_file import ARROW, PARQUET
from megatron_vlm.data.sources.containers.columnar_source import ColumnarSource
from megatron_vlm.data.sources.containers.saved_dataset import saved_files
from megatron_vlm.data.sources.containers.tar_source import TarSource
from megatron_vlm.data.sources.hub import download, is_hub
from megatron_vlm.data.sources.joined_source import JoinedSource
from megatron_vlm.data.sources.sample_source import AnnotationSource, EntrySource, SampleSource, ShardSource

TAR = ".tar"
_IN_FOLDERS = (PARQUET, TAR, ARROW)
_SPLIT = re.compile(r"(train|validation|valid|val|test|dev)(?=[-_.])")
"""At the beginning of the names of files on the hub."""


def open_source(
    path: str | Path,
    image_folder: str | Path | None,
    cache: ShardCache | None = None,
    cache_dir: str | Path | None = None,
) -> SampleSource:
    """Open the source at `path` for training.

    Args:
        path: of the source; see the table above.
        image_folder: root of the image paths in annotations.
        cache: for shards from S3.
        cache_dir: where what is found in the files is kept; default: `.lengths` beside them.

    Raises:
        DataError: there is nothing at `path`, or it is of another kind or damaged.
    """
    if is_remote(path):
        return ShardSource(str(path), cache)
    location = local_path(path)
    if location.is_dir() and (location / INDEX).exists():
        return ShardSource(location)
    files = files_of(location)
    sources = [open_entries(file, image_folder, cache_folder(file, cache_dir)) for file in files]
    for source in sources:
        if isinstance(source, ColumnarSource):
            source.check_group_sizes()
    return sources[0] if files == [location] else JoinedSource(str(path), sources)


def local_path(path: str | Path) -> Path:
    """A path on this machine. Files of the hub are downloaded.

    Raises:
        DataError: it is a URL of another kind, or the files cannot be downloaded.
    """
    if is_hub(path):
        return download(str(path))
    if "://" in str(path):
        raise DataError(f"{path} cannot be read: of URLs, only s3:// and hf:// are. Download it and give its path.")
    return Path(path)


def files_of(location: Path) -> list[Path]:
    """The files that a path stands for: itself, those of a list in braces, or those of a folder.

    Raises:
        DataError: a folder holds no data, or data of several kinds.
    """
    if location.is_dir():
        return _files_in(location)
    try:
        return [Path(name) for name in expand_path(str(location))]
    except ValueError as error:
        raise DataError(f"{error}. Correct the path.") from None


def _files_in(folder: Path) -> list[Path]:
    if saved := saved_files(folder):
        return saved
    found = {suffix: sorted(folder.rglob(f"*{suffix}")) for suffix in _IN_FOLDERS}
    kinds = [suffix for suffix, files in found.items() if files]
    if len(kinds) > 1:
        raise DataError(f"folder {folder} holds {' and '.join(kinds)} files. Give the files, or folders of one kind.")
    if not kinds:
        raise DataError(
            f"shard folder {folder} has no {INDEX}, and no {', '.join(_IN_FOLDERS)} files: it is no shard folder, or "
            "it is incomplete. Write it with megatron-vlm prepare-shards, or give the annotation files in it."
        )
    files = [file for file in found[kinds[0]] if not file.name.startswith(".")]
    check_splits(folder, files)
    return files


def check_splits(folder: Path, files: Sequence[Path]) -> None:
    """Nobody trains on a test set by giving the folder of a published dataset.

    Raises:
        DataError: the names of the files begin with those of several splits.
    """
    splits = {match[0]: file for file in files if (match := _SPLIT.match(file.name))}
    if len(splits) > 1:
        name = min(splits)
        example = splits[name].with_name(f"{name}*{splits[name].suffix}")
        raise DataError(
            f"folder {folder} holds the splits {' and '.join(sorted(splits))}. Give one of them, such as {example}."
        )


def open_entries(path: Path, image_folder: str | Path | None, cache_dir: str | Path | None) -> EntrySource:
    """Open one file of annotation entries, with or without images in it.

    Args:
        path: of the file.
        image_folder: root of the image paths in it.
        cache_dir: where what is found in the file is kept; None: nowhere.

    Raises:
        DataError: it does not exist, is of another kind, or is damaged.
    """
    if is_annotation_file(path) and path.name != INDEX and not path.is_dir():
        return AnnotationSource(path, image_folder, cache_dir)
    if path.suffix in (PARQUET, ARROW):
        return ColumnarSource(path, image_folder, cache_dir)
    if path.suffix == TAR:
        return TarSource(path, cache_dir)
    if path.exists():
        kinds = f"annotations ({', '.join(SUFFIXES)}, also with .gz), {PARQUET}, {ARROW}, {TAR} nor a shard folder"
        raise DataError(f"{path} is neither {kinds}. Convert it: convert-dataset.")
    raise DataError(f"{path} does not exist. Check the path.")
