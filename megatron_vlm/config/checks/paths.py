"""Checks of the files and folders in a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_vlm.config.checks.problems import Problem
from megatron_vlm.config.errors import nearest
from megatron_vlm.config.file_lists import expand_path
from megatron_vlm.config.recipe import Recipe
from megatron_vlm.config.values import to_bytes

_ANNOTATIONS = (".json", ".json_new", ".jsonl", ".ndjson")
_DATA_FILES = (*_ANNOTATIONS, ".parquet", ".arrow", ".tar", ".yaml", ".yml")


def path_problems(recipe: Recipe) -> list[Problem]:
    """All paths of the recipe that cannot be used. Remote paths (s3://) are not accessed."""
    return [*_check_data(recipe), *_check_tokenizer(recipe), *_check_checkpoints(recipe)]


def _check_data(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.data.data_path:
        yield Problem(
            "data.data_path", [], "no data", "Give annotation files, other sources (docs/data.md) or a mixture file"
        )
    named = {"data_path": recipe.data.data_path, "valid_data_path": recipe.data.valid_data_path or []}
    for setting, name in [(setting, name) for setting, names in named.items() for name in names]:
        try:
            paths = [] if _remote(name) else [Path(expanded) for expanded in expand_path(name)]
        except ValueError as error:
            yield Problem(f"data.{setting}", name, str(error), "Correct the path")
            continue
        yield from _check_files(f"data.{setting}", paths)
    yield from _check_cache(recipe)
    folder = recipe.data.image_folder
    if folder is not None and not _remote(folder) and not Path(folder).is_dir():
        yield _missing("data.image_folder", Path(folder), "folder")


def _check_files(setting: str, paths: list[Path]) -> Iterator[Problem]:
    """At most one problem is reported: a list in braces has many files."""
    for path in paths:
        if path.is_dir():
            continue
        if not path.exists():
            yield _missing(setting, path, "file or folder")
            return
        if path.suffix not in _DATA_FILES and Path(path.name.removesuffix(".gz")).suffix not in _ANNOTATIONS:
            yield Problem(
                setting,
                path,
                f"unknown file type ({path.suffix or 'no suffix'})",
                f"Use a file ending in {', '.join(_DATA_FILES)} (annotations also with .gz), or a folder",
            )
            return


def _check_cache(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    remote = next(
        (
            name
            for name in [*data.data_path, *(data.valid_data_path or []), data.data_root or ""]
            if name.startswith("s3://")
        ),
        None,
    )
    if remote and data.cache_dir is None:
        wrong = f"not set, but shards of {remote} are cached there"
        yield Problem("data.cache_dir", None, wrong, "Give a folder on a local disk")
    if data.cache_limit is not None:
        try:
            to_bytes(data.cache_limit)
        except ValueError:
            yield Problem("data.cache_limit", data.cache_limit, "not a size", "Give one such as 100gb or 64MiB")
    if data.data_root is not None and not _remote(data.data_root) and not Path(data.data_root).is_dir():
        yield _missing("data.data_root", Path(data.data_root), "folder")


def _check_tokenizer(recipe: Recipe) -> Iterator[Problem]:
    name = recipe.data.tokenizer_model
    key, path = "data.tokenizer_model", Path(name)
    remedy = "Use a Hugging Face tokenizer folder (with tokenizer.json) or a sentencepiece .model file"
    if not name:
        yield Problem(key, name, "no tokenizer", remedy)
    elif not path.exists():
        yield _missing(key, path, "file or folder")
    elif path.is_dir() and not (path / "tokenizer.json").is_file():
        yield Problem(key, name, "a folder without tokenizer.json", remedy)
    elif path.is_file() and path.suffix != ".model":
        yield Problem(key, name, "a file that does not end in .model", remedy)


def _check_checkpoints(recipe: Recipe) -> Iterator[Problem]:
    training = recipe.training
    for name in ("save", "load", "pretrained_checkpoint"):
        value = getattr(training, name)
        if value is not None and _remote(value):
            if not re.match(r"s3://[^/]+", value):
                yield Problem(f"training.{name}", value, "no folder and no s3:// prefix", "Use s3://bucket/prefix")
        elif value is not None and name != "save" and not Path(value).is_dir():
            yield _missing(f"training.{name}", Path(value), "folder")
    if training.save is not None and Path(training.save).exists() and not Path(training.save).is_dir():
        yield Problem("training.save", training.save, "a file, not a folder", "Use a folder, or a new path")


def _missing(setting: str, path: Path, kind: str) -> Problem:
    """A missing path, with the most similar name in its folder, or the parent folder that is missing."""
    if path.exists():
        return Problem(setting, path, f"not a {kind}", f"Use a {kind}")
    parent = path.parent
    if not parent.is_dir():
        return Problem(setting, path, f"no such {kind}: {parent} does not exist", "Create it, or correct the path")
    guess = nearest(path.name, sorted(entry.name for entry in parent.iterdir()))
    remedy = f"Did you mean {parent / guess}? Relative paths" if guess else "Relative paths"
    return Problem(setting, path, f"no such {kind}", f"{remedy} are relative to the working directory, {Path.cwd()}")


def _remote(name: str) -> bool:
    return "://" in name
