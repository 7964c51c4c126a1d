"""The folder that a run saves into: which checkpoints are in it, which of them are whole, which one a run resumes from.

SAVE/iter_0000010/                      one complete state
SAVE/iter_0000010.2/                    the same iteration saved again, in an object store; it replaces the other one
SAVE/iter_0000020.incomplete/           being written, or left of a run that was killed; never read
SAVE/latest_checkpointed_iteration.txt  Megatron-LM's tracker: the iteration that is read

SAVE is a folder or an s3:// prefix. `recipe.json` is written last: a checkpoint without it is not whole. On a disk a
checkpoint is also written beside its final name, and renamed when everything in it is stored.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, overload

from megatron_vlm.config import Recipe, recipe_from_dict
from megatron_vlm.runtime.atomic_files import atomic_file, sync
from megatron_vlm.runtime.s3.path import StoragePath, storage_path
from megatron_vlm.training.checkpoint.errors import CheckpointError
from megatron_vlm.training.checkpoint.trusted_metadata import METADATA

TRACKER = "latest_checkpointed_iteration.txt"
RECIPE = "recipe.json"
COMMON = "common.pt"
FORMAT = "metadata.json"
"""megatron-core's own: which format the folder has."""
INCOMPLETE = ".incomplete"
_REPLACED = ".replaced"
_REMOVED = ".removed"
_NAME = re.compile(r"iter_(\d{7,})(?:\.(\d+))?")


def checkpoint_name(iteration: int) -> str:
    """The name of the folder of an iteration."""
    return f"iter_{iteration:07d}"


def checkpoint_path(folder: str | Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies on a disk."""
    return Path(folder) / checkpoint_name(iteration)


def iteration_of(checkpoint: StoragePath) -> int:
    """The iteration of an iter_* folder."""
    match = _NAME.match(checkpoint.name)
    assert match is not None
    return int(match[1])


def is_whole(checkpoint: StoragePath) -> bool:
    """Whether everything of an iter_* folder was written."""
    return (checkpoint / RECIPE).is_file() and (checkpoint / METADATA).is_file()


def whole_checkpoints(folder: str | StoragePath) -> list[tuple[int, StoragePath]]:
    """(iteration, path) of the whole checkpoints in a save folder, oldest first; each iteration once."""
    newest: dict[int, StoragePath] = {}
    for iteration, _, path in named_checkpoints(folder):
        if is_whole(path):
            newest[iteration] = path
    return sorted(newest.items())


def named_checkpoints(folder: str | StoragePath) -> list[tuple[int, int, StoragePath]]:
    """(iteration, number of the save of it, path) of what is named like a checkpoint, whole or not, oldest first."""
    folder = storage_path(folder)
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), int(match[2] or 1), path) for match, path in matches if match)


def latest_checkpoint(folder: str | StoragePath) -> StoragePath | None:
    """The checkpoint that a run resumes from; None where none was ever finished.

    It is the one that the tracker names, so that somebody can go back by editing it. Where the tracker is missing,
    empty or names none that is whole, it is the newest whole one.

    Raises:
        CheckpointError: there are checkpoints and none of them is whole.
    """
    folder = storage_path(folder)
    whole = dict(whole_checkpoints(folder))
    tracked = tracked_iteration(folder)
    if tracked is not None and tracked in whole:
        return whole[tracked]
    if whole:
        return whole[max(whole)]
    if tracked is not None:
        raise CheckpointError(
            f"{folder / TRACKER} names iteration {tracked}, and no checkpoint in {folder} is whole: restore "
            f"{checkpoint_name(tracked)}, or remove {TRACKER} to start from the beginning"
        )
    return None


def tracked_iteration(folder: str | StoragePath) -> int | None:
    """What the tracker says; None where it is missing, empty or no number."""
    try:
        text = (storage_path(folder) / TRACKER).read_text().strip()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None


@overload
def require_checkpoint(folder: Path) -> Path: ...
@overload
def require_checkpoint(folder: str | StoragePath) -> StoragePath: ...
def require_checkpoint(folder: str | StoragePath) -> StoragePath:
    """Like latest_checkpoint, but a folder without one is an error."""
    found = latest_checkpoint(folder)
    if found is None:
        raise CheckpointError(
            f"{folder} holds no finished checkpoint (no {TRACKER}, no whole iter_*): is it a folder given as --save?"
        )
    return found


def read_description(checkpoint: StoragePath) -> dict[str, Any]:
    """The content of a checkpoint's recipe.json.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = checkpoint / RECIPE
    try:
        content = json.loads(path.read_text())
        content["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): copy the checkpoint again") from error
    assert isinstance(content, dict)
    return content


def read_recipe(folder: str | StoragePath) -> Recipe:
    """The recipe that the checkpoint to resume from in a save folder was written with."""
    return recipe_from_dict(read_description(require_checkpoint(folder))["recipe"])


def publish(incomplete: Path, iteration: int) -> Path:
    """Give a checkpoint that is whole its name, and let the tracker name it.

    A checkpoint that has the name already is removed afterwards, so that there is a whole one at any moment.
    """
    folder, target = incomplete.parent, checkpoint_path(incomplete.parent, iteration)
    replaced = target.with_name(target.name + _REPLACED)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    incomplete.rename(target)
    sync(folder)
    with atomic_file(folder / TRACKER) as file:
        file.write(str(iteration).encode())
    shutil.rmtree(replaced, ignore_errors=True)
    for number, _, path in named_checkpoints(folder):  # copied from an object store: iter_0000010.2
        if number == iteration and path != target:
            _remove(Path(str(path)))
    return target


def old_iterations(folder: StoragePath, keep_latest: int | None, keep_every: int | None) -> list[int]:
    """Iterations of whole checkpoints that are neither among the newest `keep_latest` nor divisible by `keep_every`,
    without the one that the tracker names.
    """
    if keep_latest is None:
        return []
    whole, tracked = whole_checkpoints(folder), tracked_iteration(folder)
    return [
        iteration
        for iteration, _ in whole[:-keep_latest]
        if iteration != tracked and not (keep_every and iteration % keep_every == 0)
    ]


def remove_old(folder: Path, keep_latest: int | None, keep_every: int | None) -> list[Path]:
    """Remove the checkpoints of `old_iterations` from a disk. Returns what was removed."""
    old = set(old_iterations(folder, keep_latest, keep_every))
    paths = [Path(str(path)) for iteration, _, path in named_checkpoints(folder) if iteration in old]
    for path in paths:
        _remove(path)
    return paths


def _remove(checkpoint: Path) -> None:
    doomed = checkpoint.with_name(checkpoint.name + _REMOVED)  # stopped in the middle, it must not look whole
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def recover(folder: str | Path) -> None:
    """Tidy up after a run that was killed while it renamed or removed; one rank calls this before any looks."""
    for path in sorted(Path(folder).glob("iter_*.*")):
        target = path.with_name(path.name.partition(".")[0])
        if path.name.endswith(_REPLACED) and not target.exists() and is_whole(path):
            path.rename(target)
        elif path.name.endswith((_REPLACED, _REMOVED)):
            shutil.rmtree(path, ignore_errors=True)
