"""The folder that a run saves into: which checkpoints are in it, which of them are whole, which one a run resumes from.

SAVE/iter_0000010/                      one complete state
SAVE/iter_0000020.incomplete/           being written, or left of a run that was killed; never read
SAVE/latest_checkpointed_iteration.txt  Megatron-LM's tracker: the iteration that is read

A checkpoint is written beside its final name and renamed when everything in it is on the disk. `recipe.json` is written
last, so that a folder of older versions is known to be whole by it, too.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_vlm.config import Recipe, recipe_from_dict
from megatron_vlm.runtime.atomic_files import atomic_file, sync
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
_NAME = re.compile(r"iter_(\d{7,})")


def checkpoint_path(folder: str | Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return Path(folder) / f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int:
    """The iteration of an iter_* folder."""
    return int(checkpoint.name.removeprefix("iter_"))


def is_whole(checkpoint: Path) -> bool:
    """Whether everything of an iter_* folder was written."""
    return (checkpoint / RECIPE).is_file() and (checkpoint / METADATA).is_file()


def whole_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(iteration, path) of the whole checkpoints in a save folder, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in named if is_whole(path))


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that a run resumes from; None where none was ever finished.

    It is the one that the tracker names, so that somebody can go back by editing it. Where the tracker is missing,
    empty or names none that is whole, it is the newest whole one.

    Raises:
        CheckpointError: there are checkpoints and none of them is whole.
    """
    folder = Path(folder)
    whole = dict(whole_checkpoints(folder))
    tracked = tracked_iteration(folder)
    if tracked is not None and tracked in whole:
        return whole[tracked]
    if whole:
        return whole[max(whole)]
    if tracked is not None:
        raise CheckpointError(
            f"{folder / TRACKER} names iteration {tracked}, and no checkpoint in {folder} is whole: restore "
            f"{checkpoint_path(folder, tracked).name}, or remove {TRACKER} to start from the beginning"
        )
    return None


def tracked_iteration(folder: str | Path) -> int | None:
    """What the tracker says; None where it is missing, empty or no number."""
    try:
        text = (Path(folder) / TRACKER).read_text().strip()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None


def require_checkpoint(folder: str | Path) -> Path:
    """Like latest_checkpoint, but a folder without one is an error."""
    found = latest_checkpoint(folder)
    if found is None:
        raise CheckpointError(
            f"{folder} holds no finished checkpoint (no {TRACKER}, no whole iter_*): is it a folder given as --save?"
        )
    return found


def read_description(checkpoint: Path) -> dict[str, Any]:
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


def read_recipe(folder: str | Path) -> Recipe:
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
    return target


def remove_old(folder: Path, keep_latest: int | None, keep_every: int | None) -> list[Path]:
    """Remove whole checkpoints that are neither among the newest `keep_latest` nor of an iteration divisible by
    `keep_every`, never the one that the tracker names. Returns what was removed.
    """
    if keep_latest is None:
        return []
    whole, tracked = whole_checkpoints(folder), tracked_iteration(folder)
    old = [
        path
        for iteration, path in whole[:-keep_latest]
        if iteration != tracked and not (keep_every and iteration % keep_every == 0)
    ]
    for path in old:
        doomed = path.with_name(path.name + _REMOVED)  # stopped in the middle, it must not look whole
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return old


def recover(folder: str | Path) -> None:
    """Tidy up after a run that was killed while it renamed or removed; one rank calls this before any looks."""
    for path in sorted(Path(folder).glob("iter_*.*")):
        target = path.with_name(path.name.partition(".")[0])
        if path.name.endswith(_REPLACED) and not target.exists() and is_whole(path):
            path.rename(target)
        elif path.name.endswith((_REPLACED, _REMOVED)):
            shutil.rmtree(path, ignore_errors=True)
