"""Writes annotations and images as shards. Every sample is validated, every image decoded, and errors are listed.

The samples are divided into parts of equal size. One process writes the shards of a part and then a record of its
samples. Parts with a record are not written again, so an interrupted run can be resumed. The parts can be distributed
over several jobs. The merge adds up the records and writes the index, which completes the set.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.prepare.annotation_finder import find_annotations
from megatron_vlm.data.prepare.shard_destination import QUARANTINE, LocalDestination, S3Destination, open_destination
from megatron_vlm.data.shards.mds_format import INDEX, ShardSample, ShardWriter, merge_indexes
from megatron_vlm.data.sources.open_source import open_entries
from megatron_vlm.data.sources.sample_source import EntrySource, SourceList
from megatron_vlm.data.worker_pool import parallel_map, report_progress

MAX_SAMPLES_PER_PART = 4096
_MIN_SAMPLES_PER_PART = 64
_MIN_PARTS = 16
"""Keeps several processes busy; only very small sets have fewer parts. With more parts, a small set would exceed one
shuffle window (shard_shuffle.py).
"""
_RECORDS = "parts"
_PLAN = "plan.json"


@dataclass
class PrepareSummary:
    """Sample counts. `read` is `written` plus the sum of `quarantined`."""

    read: int = 0
    written: int = 0
    images: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    """By reason."""
    quarantine: str | None = None
    """File that lists the quarantined samples, one JSON object per line; None: there are none."""


def prepare_shards(
    annotations: Sequence[str | Path],
    image_folder: str | Path | None,
    output: str | Path,
    processes: int | None = None,
    size_limit: int = 1 << 26,
    samples_per_part: int | None = None,
    job: tuple[int, int] | None = None,
) -> PrepareSummary:
    """Write a shard set, or the parts of one job.

    Invalid samples are listed with the reason in `quarantine.jsonl` inside the set. If no sample is valid, no set is
    written and they are listed in `<output>.quarantine.jsonl`.

    Args:
        annotations: files that `open_entries` takes, lists of them in braces, and folders of them.
        image_folder: root of their image paths.
        output: folder or s3:// prefix. The set becomes visible when it is complete.
        processes: number of processes that decode images; default: one per core.
        size_limit: of a shard, in bytes.
        samples_per_part: samples that one process writes at a time; default: 1/16 of the set, at most 4096.
        job: (k, n): write every n-th part from the k-th, with k from 1, and do not merge; see `merge_parts`.

    Returns:
        Sample counts of the set, or of the parts of `job`.

    Raises:
        DataError: an annotation file cannot be read, or `output` is not empty or holds parts of another run.
    """
    destination = open_destination(output)
    sources = SourceList([open_entries(path, image_folder, None) for path in find_annotations(annotations)])
    if samples_per_part is None:  # derived from the set alone, so that all jobs agree
        samples_per_part = min(max(-(-len(sources) // _MIN_PARTS), _MIN_SAMPLES_PER_PART), MAX_SAMPLES_PER_PART)
    parts = -(-len(sources) // samples_per_part)
    plan = {
        "sources": [[str(source.name), source.content_hash()] for source in sources.sources],
        "samples": len(sources),
        "parts": parts,
        "samples_per_part": samples_per_part,
        "size_limit": size_limit,
    }
    _check_plan(destination, plan, output)
    done = {int(name.partition(".")[0]) for name in destination.list_names(_RECORDS) if name != _PLAN}
    first, step = (job[0] - 1, job[1]) if job else (0, 1)
    own = range(first, parts, step)
    todo = [number for number in own if number not in done]
    writer = _PartWriter(sources, destination, samples_per_part, size_limit)
    total, left = (sum(len(writer.samples_of(number)) for number in numbers) for numbers in (own, todo))
    for _ in parallel_map(
        lambda index: writer(todo[index]), len(todo), processes, f"writing {output}", chunk=1, samples=total,
        samples_before=total - left,
    ):  # fmt: skip
        pass
    if job:
        return _summarize(_read_records(destination, own))
    return merge_parts(output)


def _check_plan(destination: LocalDestination | S3Destination, plan: dict[str, Any], output: str | Path) -> None:
    """Parts that already exist must hold the same samples with the same settings."""
    content = json.dumps(plan, sort_keys=True).encode()
    existing = destination.read(f"{_RECORDS}/{_PLAN}")
    if existing is None:
        destination.write(f"{_RECORDS}/{_PLAN}", content)
    elif existing != content:
        old = json.loads(existing)
        changed = ", ".join(key for key in plan if old.get(key) != plan[key])
        where = destination.partial if isinstance(destination, LocalDestination) else output
        raise DataError(
            f"{where} holds parts of a run with other {changed}. Use the previous settings to resume it, or remove the "
            "parts to start again."
        )


def merge_parts(output: str | Path) -> PrepareSummary:
    """Complete a shard set whose parts are all written.

    Raises:
        DataError: `output` already holds a set, or parts are missing.
    """
    destination = open_destination(output)
    content = destination.read(f"{_RECORDS}/{_PLAN}")
    if content is None:
        raise DataError(f"{output} has no parts to merge. Write them with --job first.")
    parts = int(json.loads(content)["parts"])
    done = set(destination.list_names(_RECORDS))
    missing = [number for number in range(parts) if _record_name(number) not in done]
    if missing:
        raise DataError(f"{len(missing)} of {parts} parts of {output} are missing, the first is part {missing[0]}")
    records = list(_read_records(destination, range(parts)))
    summary = _summarize(records)
    lines = "".join(json.dumps(item) + "\n" for record in records for item in record["bad"]).encode()
    if not summary.written:
        summary.quarantine = destination.write_beside(QUARANTINE, lines)
        return summary
    if lines:
        destination.write(QUARANTINE, lines)
        summary.quarantine = f"{output}/{QUARANTINE}"
    index = merge_indexes([(_folder(n), record["index"]) for n, record in enumerate(records) if record["index"]])
    destination.publish(json.dumps(index).encode())
    return summary


def _folder(number: int) -> str:
    return f"{number:05d}"


def _record_name(number: int) -> str:
    return f"{number:05d}.json"


def _read_records(destination: LocalDestination | S3Destination, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    for number in numbers:
        content = destination.read(f"{_RECORDS}/{_record_name(number)}")
        assert content is not None
        yield json.loads(content)


def _summarize(records: Iterable[dict[str, Any]]) -> PrepareSummary:
    summary = PrepareSummary()
    for record in records:
        summary.read += record["read"]
        summary.written += record["written"]
        summary.images += record["images"]
        summary.quarantined.update(item["reason"] for item in record["bad"])
    return summary


class _PartWriter:
    """Writes the shards of a part and its record."""

    def __init__(
        self, sources: SourceList, destination: LocalDestination | S3Destination, samples_per_part: int, limit: int
    ) -> None:
        self.sources = sources
        self.destination = destination
        self.samples_per_part = samples_per_part
        self.limit = limit

    def samples_of(self, number: int) -> range:
        """Global sample numbers of a part."""
        start = number * self.samples_per_part
        return range(start, min(start + self.samples_per_part, len(self.sources)))

    def __call__(self, number: int) -> None:
        invalid: list[dict[str, object]] = []
        images = 0
        index = None
        with self.destination.staging(_folder(number)) as folder:
            with ShardWriter(folder, self.limit) as writer:
                for done, sample_number in enumerate(self.samples_of(number), 1):
                    source_index, entry = self.sources.locate(sample_number)
                    source = self.sources.sources[source_index]
                    assert isinstance(source, EntrySource)
                    try:
                        sample = _load(source, entry)
                    except SampleError as error:
                        invalid.append(
                            {"file": source.name, "index": entry, "id": error.sample_id, "reason": error.reason,
                             "message": str(error)}
                        )  # fmt: skip
                    else:
                        writer.write(sample)
                        images += len(sample.images)
                    report_progress(done)
            if writer.written:
                index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
                (folder / INDEX).unlink()  # only a complete set has an index
        record = {
            "read": len(self.samples_of(number)), "written": writer.written, "images": images, "bad": invalid,
            "index": index,
        }  # fmt: skip
        self.destination.write(f"{_RECORDS}/{_record_name(number)}", json.dumps(record).encode())


def _load(source: EntrySource, index: int) -> ShardSample:
    sample = source.sample(index)
    loaded = [sample.load_image(i) for i in range(len(sample.image_names))]
    return ShardSample(source.entry(index), [data for data, _ in loaded], [size for _, size in loaded])
