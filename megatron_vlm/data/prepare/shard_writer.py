"""Annotations and image files to shards: every sample is checked, every image decoded; nothing is lost in silence.

The samples are cut into parts of equal number. A part is done by one process, which writes its shards and then a note
of what became of its samples; parts that have a note are not done again. Several machines may do some of the parts
each. The merge adds the notes up and writes the index, by which the set appears.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.prepare.shard_destination import LocalDestination, S3Destination, open_destination
from megatron_vlm.data.shards.mds_format import INDEX, ShardSample, ShardWriter, merge_indexes
from megatron_vlm.data.sources.sample_source import AnnotationSource, SourceList
from megatron_vlm.data.worker_pool import parallel_map, report_progress

QUARANTINE = "quarantine.jsonl"
MOST_SAMPLES_PER_PART = 4096
_LEAST_SAMPLES_PER_PART = 64
_PARTS = 16
"""That a set has at least, so that processes find work; a very small one has fewer. Not more: a small set lies within
one shuffle window then, see order.py."""
_NOTES = "parts"
_PLAN = "plan.json"


@dataclass
class PrepareSummary:
    """What became of the samples: read = written + the sum of quarantined."""

    read: int = 0
    written: int = 0
    images: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    """By reason."""
    quarantine: str | None = None
    """File that lists them, one JSON object per line; None where there are none."""


def find_annotations(paths: Sequence[str | Path]) -> list[Path]:
    """The annotation files that some paths name; a folder stands for all `.json` and `.jsonl` files below it.

    Raises:
        DataError: a folder has none.
    """
    found = []
    for path in map(Path, paths):
        files = sorted(file for file in path.rglob("*.json*") if file.suffix in (".json", ".jsonl"))
        if path.is_dir() and not files:
            raise DataError(f"folder {path} has no .json or .jsonl file")
        found += files if path.is_dir() else [path]
    return found


def prepare_shards(
    annotations: Sequence[str | Path],
    image_folder: str | Path | None,
    output: str | Path,
    processes: int | None = None,
    size_limit: int = 1 << 26,
    samples_per_part: int | None = None,
    share: tuple[int, int] | None = None,
) -> PrepareSummary:
    """Write one set of shards, or some of its parts.

    Bad samples are listed with the reason in `quarantine.jsonl` inside the set, or, where no sample is good and so no
    set is written, in `<output>.quarantine.jsonl`.

    Args:
        annotations: `.json` and `.jsonl` files, and folders of them.
        image_folder: what their image paths start from.
        output: folder, or s3://…; appears when it is whole.
        processes: that decode images; default: as many as this machine's cores.
        size_limit: bytes of a shard.
        samples_per_part: what is done at a time, and not done again; default: a 16th of the set, at most 4096.
        share: (k, n): only every n-th part from the k-th on, k from 1, and no merge; see `merge_parts`.

    Returns:
        What became of the samples; with `share`, of those of its parts.

    Raises:
        DataError: an annotation file cannot be read, or `output` holds something already, or parts of something else.
    """
    destination = open_destination(output)
    sources = SourceList([AnnotationSource(path, image_folder) for path in find_annotations(annotations)])
    if samples_per_part is None:  # of the set alone: all machines that share it must agree
        samples_per_part = min(max(-(-len(sources) // _PARTS), _LEAST_SAMPLES_PER_PART), MOST_SAMPLES_PER_PART)
    parts = -(-len(sources) // samples_per_part)
    plan = {
        "sources": [[str(source.name), source.content_hash()] for source in sources.sources],
        "samples": len(sources),
        "parts": parts,
        "samples_per_part": samples_per_part,
        "size_limit": size_limit,
    }
    _agree(destination, plan, output)
    done = {int(name.partition(".")[0]) for name in destination.names(_NOTES) if name != _PLAN}
    first, step = (share[0] - 1, share[1]) if share else (0, 1)
    mine = range(first, parts, step)
    todo = [number for number in mine if number not in done]
    maker = _PartMaker(sources, destination, samples_per_part, size_limit)
    amounts = [sum(len(maker.members(number)) for number in numbers) for numbers in (mine, todo)]
    for _ in parallel_map(
        lambda place: maker(todo[place]), len(todo), processes, f"writing {output}", chunk=1, samples=amounts[0],
        samples_before=amounts[0] - amounts[1],
    ):  # fmt: skip
        pass
    if share:
        return _add_up(_notes(destination, mine))
    return merge_parts(output)


def _agree(destination: LocalDestination | S3Destination, plan: dict[str, Any], output: str | Path) -> None:
    """Parts that are there already must be of the same samples, cut alike."""
    content = json.dumps(plan, sort_keys=True).encode()
    before = destination.read(f"{_NOTES}/{_PLAN}")
    if before is None:
        destination.write(f"{_NOTES}/{_PLAN}", content)
    elif before != content:
        old = json.loads(before)
        changed = ", ".join(key for key in plan if old.get(key) != plan[key])
        where = destination.partial if isinstance(destination, LocalDestination) else output
        raise DataError(
            f"{where} holds parts of a run with other {changed}. Call it as before to go on, or remove them to begin "
            "anew."
        )


def merge_parts(output: str | Path) -> PrepareSummary:
    """Make a set of its parts.

    Raises:
        DataError: `output` holds a set already, or parts are missing.
    """
    destination = open_destination(output)
    content = destination.read(f"{_NOTES}/{_PLAN}")
    if content is None:
        raise DataError(f"there are no parts of {output} to be merged")
    parts = int(json.loads(content)["parts"])
    done = set(destination.names(_NOTES))
    missing = [number for number in range(parts) if _note_name(number) not in done]
    if missing:
        raise DataError(f"{len(missing)} of {parts} parts of {output} are not done yet, the first is part {missing[0]}")
    notes = list(_notes(destination, range(parts)))
    summary = _add_up(notes)
    lines = "".join(json.dumps(item) + "\n" for note in notes for item in note["bad"]).encode()
    if not summary.written:
        summary.quarantine = destination.beside(QUARANTINE, lines)
        return summary
    if lines:
        destination.write(QUARANTINE, lines)
        summary.quarantine = f"{output}/{QUARANTINE}"
    index = merge_indexes([(_folder(number), note["index"]) for number, note in enumerate(notes) if note["index"]])
    destination.publish(json.dumps(index).encode())
    return summary


def _folder(number: int) -> str:
    return f"{number:05d}"


def _note_name(number: int) -> str:
    return f"{number:05d}.json"


def _notes(destination: LocalDestination | S3Destination, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    for number in numbers:
        content = destination.read(f"{_NOTES}/{_note_name(number)}")
        assert content is not None
        yield json.loads(content)


def _add_up(notes: Sequence[dict[str, Any]] | Iterator[dict[str, Any]]) -> PrepareSummary:
    summary = PrepareSummary()
    for note in notes:
        summary.read += note["read"]
        summary.written += note["written"]
        summary.images += note["images"]
        summary.quarantined.update(item["reason"] for item in note["bad"])
    return summary


class _PartMaker:
    """Writes a part and its note."""

    def __init__(
        self, sources: SourceList, destination: LocalDestination | S3Destination, samples_per_part: int, limit: int
    ) -> None:
        self.sources = sources
        self.destination = destination
        self.samples_per_part = samples_per_part
        self.limit = limit

    def members(self, number: int) -> range:
        """Sample numbers of a part."""
        start = number * self.samples_per_part
        return range(start, min(start + self.samples_per_part, len(self.sources)))

    def __call__(self, number: int) -> None:
        bad: list[dict[str, object]] = []
        images = 0
        index = None
        with self.destination.staging(_folder(number)) as folder:
            with ShardWriter(folder, self.limit) as writer:
                for done, member in enumerate(self.members(number), 1):
                    place, entry = self.sources.locate(member)
                    source = self.sources.sources[place]
                    assert isinstance(source, AnnotationSource)
                    try:
                        sample = _load(source, entry)
                    except SampleError as error:
                        bad.append(
                            {"file": source.name, "index": entry, "id": error.sample_id, "reason": error.reason,
                             "message": str(error)}
                        )  # fmt: skip
                    else:
                        writer.write(sample)
                        images += len(sample.images)
                    report_progress(done)
            if writer.written:
                index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
                (folder / INDEX).unlink()  # a part is no set
        note = {
            "read": len(self.members(number)), "written": writer.written, "images": images, "bad": bad, "index": index,
        }  # fmt: skip
        self.destination.write(f"{_NOTES}/{_note_name(number)}", json.dumps(note).encode())


def _load(source: AnnotationSource, index: int) -> ShardSample:
    sample = source.sample(index)
    loaded = [sample.load_image(place) for place in range(len(sample.image_names))]
    return ShardSample(source.entry(index), [data for data, _ in loaded], [size for _, size in loaded])
