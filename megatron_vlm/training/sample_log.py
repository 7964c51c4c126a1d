"""Which samples were trained on, rank by rank: for audits, and to see that a stopped run went on where it should.

Each data rank writes `samples-rankN.jsonl` in the save folder, one line for each row: `row` is its number since the
start of training, `samples` the ids in it. All files together, ordered by `row`, are the run. A run that goes on after
a checkpoint first takes out what was written after it, in the files of all ranks there ever were: those rows come
again, perhaps on other ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_vlm.data.batch import PackedBatch
from megatron_vlm.training.json_lines import keep_lines, read_lines

_PATTERN = "samples-rank*.jsonl"


def cut_back(folder: Path, consumed_rows: int) -> None:
    """Take out of all ranks' files what comes after the first `consumed_rows` rows. One rank of the run does this."""
    for path in folder.glob(_PATTERN):
        keep_lines(path, lambda line: line["row"] < consumed_rows)


class SampleLog(Iterator[PackedBatch]):
    """Hands rows on and writes down what is in them."""

    def __init__(self, rows: Iterator[PackedBatch], folder: Path, rank: int) -> None:
        """
        Args:
            rows: of this rank.
            folder: exists.
            rank: in the world; names the file.
        """
        self._rows = rows
        self._file = (folder / _PATTERN.replace("*", str(rank))).open("a", buffering=1)

    def __next__(self) -> PackedBatch:
        batch = next(self._rows)
        self._file.write(json.dumps({"row": batch.row_index, "samples": batch.sample_ids}) + "\n")
        return batch


def read_samples(folder: Path) -> list[tuple[int, list[str]]]:
    """(row, ids of its samples) of a run, over all ranks, in the order of the rows."""
    lines = (line for path in folder.glob(_PATTERN) for line in read_lines(path))
    return sorted((line["row"], line["samples"]) for line in lines)
