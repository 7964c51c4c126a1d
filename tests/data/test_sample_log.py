"""The sample log of several ranks, read as one and truncated for a resumed run."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_vlm.data.rows.batch import PackedBatch
from megatron_vlm.data.sample_log import SampleLog, read_samples, truncate_logs


def row(row_index: int) -> PackedBatch:
    empty = torch.empty(0)
    return PackedBatch(
        empty, empty, empty, [0], empty, empty, 0, sample_ids=[f"s{row_index}", "é"], row_index=row_index
    )


def test_written_by_several_ranks_and_read_as_one(tmp_path: Path) -> None:
    for rank in (0, 1):
        assert [batch.row_index for batch in SampleLog(iter(map(row, range(rank, 12, 2))), tmp_path, rank)] == list(
            range(rank, 12, 2)
        )
    assert read_samples(tmp_path) == [(number, [f"s{number}", "é"]) for number in range(12)]


def test_truncated_in_the_files_of_all_ranks(tmp_path: Path) -> None:
    for rank in range(3):
        list(SampleLog(iter(map(row, range(rank, 12, 3))), tmp_path, rank))
    with (tmp_path / "samples-rank1.jsonl").open("a") as file:
        file.write('{"row": 2, "samp')  # killed while it wrote
    truncate_logs(tmp_path, 7)
    assert [number for number, _ in read_samples(tmp_path)] == list(range(7))
    list(SampleLog(iter(map(row, range(7, 9))), tmp_path, 0))
    assert [number for number, _ in read_samples(tmp_path)] == list(range(9))
    truncate_logs(tmp_path, 0)
    assert read_samples(tmp_path) == []
