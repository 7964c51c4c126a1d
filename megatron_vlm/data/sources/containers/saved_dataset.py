"""Folders that `save_to_disk` of Hugging Face's datasets writes. They are read by pyarrow alone."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_vlm.data.errors import DataError

_STATE, _SPLITS = "state.json", "dataset_dict.json"


def saved_files(folder: Path) -> list[Path] | None:
    """The Arrow files of a saved dataset, in its order, or None if the folder is not one.

    Raises:
        DataError: it holds several splits, or rows were selected or shuffled without being written.
    """
    if (folder / _SPLITS).is_file():
        splits = json.loads((folder / _SPLITS).read_text()).get("splits", [])
        if len(splits) != 1:
            choice = " or ".join(str(folder / split) for split in splits)
            raise DataError(f"{folder} holds the splits {', '.join(splits)}. Give one of them: {choice}.")
        folder = folder / splits[0]
    if not (folder / _STATE).is_file():
        return None
    try:
        state = json.loads((folder / _STATE).read_text())
        files = [folder / item["filename"] for item in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / _STATE} is damaged: {error}. Save the dataset again.") from None
    if state.get("_indices_files"):
        raise DataError(f"{folder} holds an order of rows beside them. Call flatten_indices() and save it again.")
    return files
