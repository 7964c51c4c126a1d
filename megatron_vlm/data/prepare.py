"""Annotations and image files to shards: every sample is checked, every image decoded; nothing is lost in silence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_vlm.data.errors import SampleError
from megatron_vlm.data.parallel import map_numbers
from megatron_vlm.data.shards import ShardSample, ShardWriter
from megatron_vlm.data.sources import AnnotationSource

QUARANTINE = "quarantine.jsonl"


@dataclass
class PrepareSummary:
    """What became of the samples: read = written + the sum of quarantined."""

    read: int = 0
    written: int = 0
    images: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    """By reason."""
    quarantine: Path | None = None
    """File that lists them, one JSON object per line; None where there are none."""


def prepare_shards(
    annotations: Sequence[str | Path],
    image_folder: str | Path | None,
    output: str | Path,
    processes: int | None = None,
    size_limit: int = 1 << 26,
) -> PrepareSummary:
    """Write one folder of shards.

    Bad samples are listed with the reason in `quarantine.jsonl` inside the folder, or, where no sample is good and so
    no folder is written, in `<output>.quarantine.jsonl`.

    Args:
        annotations: `.json` and `.jsonl` files.
        image_folder: what their image paths start from.
        output: folder to be written; appears when it is whole.
        processes: that decode images; default: as many as this machine's cores.
        size_limit: bytes of a shard.

    Raises:
        DataError: an annotation file cannot be read, or `output` holds something already.
    """
    sources = [AnnotationSource(path, image_folder) for path in annotations]
    summary = PrepareSummary()
    bad: list[dict[str, object]] = []
    with ShardWriter(output, size_limit) as writer:
        for source in sources:
            outcomes = map_numbers(_Check(source), len(source), processes, f"checking {source.name}")
            for index, outcome in enumerate(outcomes):
                summary.read += 1
                # Read again, from the page cache: images sent between processes would pile up in memory.
                sample = outcome if isinstance(outcome, SampleError) else _load(source, index, outcome)
                if isinstance(sample, SampleError):
                    summary.quarantined[sample.reason] += 1
                    bad.append(
                        {
                            "file": source.name,
                            "index": index,
                            "id": sample.sample_id,
                            "reason": sample.reason,
                            "message": str(sample),
                        }
                    )
                    continue
                writer.write(sample)
                summary.written += 1
                summary.images += len(sample.images)
        if bad:
            lines = "".join(json.dumps(item) + "\n" for item in bad)
            if summary.written:
                summary.quarantine = Path(output) / QUARANTINE
                (writer.partial / QUARANTINE).write_text(lines, encoding="utf-8")
            else:
                summary.quarantine = Path(output).with_name(f"{Path(output).name}.{QUARANTINE}")
                summary.quarantine.write_text(lines, encoding="utf-8")
    return summary


class _Check:
    """Image sizes of a good sample, or what is wrong with it."""

    def __init__(self, source: AnnotationSource) -> None:
        self._source = source

    def __call__(self, index: int) -> list[tuple[int, int]] | SampleError:
        try:
            return self._source.sample(index).measure_images()
        except SampleError as error:
            return error


def _load(source: AnnotationSource, index: int, sizes: list[tuple[int, int]]) -> ShardSample | SampleError:
    sample = source.sample(index)
    try:
        images = [sample.read_image(place) for place in range(len(sample.image_names))]
    except OSError as error:
        return SampleError(sample.id, source.name, "unreadable image", str(error), "It vanished while it was read.")
    return ShardSample(source.entry(index), images, sizes)
