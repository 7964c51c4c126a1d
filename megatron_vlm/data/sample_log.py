"""A log of the samples a run was trained on, for audits and to check that it resumed at the right sample.

Each data-parallel rank writes `samples-rankN.jsonl` in the save folder, one line per row: `row` is its index since the
start of training, `samples` the ids in it. The files of all ranks together, sorted by `row`, describe the run. A
resumed run first removes the rows after its checkpoint from all files, because other ranks may train on them this time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_vlm.data.rows.rank_batch import AnyBatch
from megatron_vlm.runtime.json_lines import keep_lines, read_lines

SAMPLES_PATTERN = "samples-rank*.jsonl"


def log_samples(
    rows: Iterator[AnyBatch],
    folder: Path,
    consumed_rows: int,
    *,
    rank: int,
    is_writer: bool,
    barrier: Callable[[], None],
) -> Iterator[AnyBatch]:
    """Log the rows that are read from the returned iterator; every rank of the run calls this.

    Args:
        rows: of this rank.
        folder: the save folder; created if missing.
        consumed_rows: rows of all ranks up to the checkpoint; later ones are removed from all files.
        rank: in the world; names the file.
        is_writer: True on one of the ranks that read the same rows.
        barrier: returns when every rank has called it.
    """
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        truncate_logs(folder, consumed_rows)
    barrier()
    return SampleLog(rows, folder, rank) if is_writer else rows


def truncate_logs(folder: Path, consumed_rows: int, files: str = SAMPLES_PATTERN) -> None:
    """Remove the rows from index `consumed_rows` on from the matching files; one rank calls this for each file."""
    for path in folder.glob(files):
        keep_lines(path, lambda line: line["row"] < consumed_rows)


class SampleLog(Iterator[AnyBatch]):
    """Yields rows and appends their sample ids to the file of `rank` in `folder`, which must exist."""

    def __init__(self, rows: Iterator[AnyBatch], folder: Path, rank: int) -> None:
        self._rows = rows
        self._file = (folder / SAMPLES_PATTERN.replace("*", str(rank))).open("a", buffering=1)

    def __next__(self) -> AnyBatch:
        batch = next(self._rows)
        self._file.write(json.dumps({"row": batch.row_index, "samples": batch.sample_ids}) + "\n")
        return batch


def read_samples(folder: Path) -> list[tuple[int, list[str]]]:
    """(row index, sample ids) of every row of a run, over all ranks, sorted by row."""
    lines = (line for path in folder.glob(SAMPLES_PATTERN) for line in read_lines(path))
    return sorted((line["row"], line["samples"]) for line in lines)
