"""Runs a converter over the rows of tables: validates each entry, counts, and lists what was rejected and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.data.prepare.converters import Converter, Entry
from megatron_vlm.data.prepare.image_store import ImageStore
from megatron_vlm.data.prepare.tables import RowError, read_rows
from megatron_vlm.data.sources.annotations import parse_annotation
from megatron_vlm.runtime.atomic_files import atomic_file

_MAX_SHOWN = 200


@dataclass
class ConversionSummary:
    """Counts. `read` is `converted` plus the sum of `rejected`."""

    read: int = 0
    """Samples read: one per row, or more if a row holds several."""
    converted: int = 0
    written: int = 0
    """Entries written: `converted`, or fewer if the converter merges entries."""
    rejected: Counter[str] = field(default_factory=Counter)
    """By reason."""


@dataclass
class _Conversion:
    converter: Converter
    images: ImageStore
    summary: ConversionSummary = field(default_factory=ConversionSummary)
    listed: list[dict[str, Any]] = field(default_factory=list)

    def entries(self, rows: Iterator[Entry | RowError]) -> Iterator[Entry]:
        """The valid entries of all rows."""
        for row in rows:
            samples = iter([row]) if isinstance(row, RowError) else self.converter.split(row)
            for sample in samples:
                self.summary.read += 1
                try:
                    if isinstance(sample, RowError):
                        raise sample
                    entry = self._valid(self.converter.entry(sample, self.images))
                except Exception as error:  # one bad row never ends the conversion of the others
                    self._reject({} if isinstance(sample, RowError) else sample, error)
                else:
                    self.summary.converted += 1
                    yield entry

    def _valid(self, entry: Entry) -> Entry:
        """The entry as training will read it.

        Raises:
            SampleError: training would reject it.
            RowError: one of its images is unreadable.
        """
        annotation = parse_annotation(entry, 0, "the input")
        for path in annotation.image_paths:
            self.images.verify(path)
        turns = [{"from": turn.role, "value": turn.text} for turn in annotation.turns]
        if len(turns) < len(entry.get("conversations", ())):  # a question without an answer went, with its images
            entry = {key: value for key, value in entry.items() if key != "image"}
            paths = annotation.image_paths
            entry |= {"image": paths if len(paths) > 1 else paths[0]} if paths else {}
        return {**entry, "conversations": turns}

    def _reject(self, row: Entry, error: Exception) -> None:
        if isinstance(error, OSError):  # a full disk is no error of the row
            raise error
        if isinstance(error, DataError) and not isinstance(error, SampleError):  # nor is a package that is missing
            raise error
        if isinstance(error, SampleError):
            reason, message = error.reason, f"{error.reason}: {error.what}. {error.remedy}"
        elif isinstance(error, RowError):
            reason, message = error.reason, str(error)
        else:
            reason, message = "cannot be converted", f"cannot be converted: {type(error).__name__}: {error}"
        self.summary.rejected[reason] += 1
        shown = {str(name): repr(value)[:_MAX_SHOWN] for name, value in row.items()}
        self.listed.append({"reason": reason, "message": message, "row": shown})


def convert(
    converter: Converter, inputs: Sequence[Path], output: Path, images: ImageStore, job: tuple[int, int] = (1, 1)
) -> ConversionSummary:
    """Write the entries of all rows to `output` (JSON lines), atomically.

    Rejected rows are listed in `quarantine_of(output)`, which is removed if there are none.

    Args:
        converter: converts a row.
        inputs: tables.
        output: JSON lines file.
        images: stores the images.
        job: (k, n): convert every n-th row of each input from the k-th, with k from 1.

    Raises:
        DataError: an input cannot be read.
    """
    conversion = _Conversion(converter, images)
    summary, (k, n) = conversion.summary, job
    rows = (row for path in inputs for row in islice(read_rows(path), k - 1, None, n))
    with atomic_file(output) as file:
        for entry in converter.combine(conversion.entries(rows)):
            entry = {"id": f"{output.stem}-{summary.written * n + k - 1}", **entry}
            file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            summary.written += 1
    quarantine = quarantine_of(output)
    if conversion.listed:
        lines = "".join(json.dumps(item) + "\n" for item in conversion.listed)
        with atomic_file(quarantine) as file:
            file.write(lines.encode())
    else:
        quarantine.unlink(missing_ok=True)
    return summary


def quarantine_of(output: Path) -> Path:
    """The file that lists the rejected rows of a conversion."""
    return output.with_name(f"{output.name}.quarantine.jsonl")


def check_paths(inputs: Sequence[Path], output: Path, image_folder: Path) -> None:
    """
    Raises:
        DataError: a path is of the wrong kind, or the output would replace an input.
    """
    for path in inputs:
        if path.is_dir():
            raise DataError(f"--input {path} is a folder: give the files in it")
        if path.exists() and output.exists() and path.samefile(output):
            raise DataError(f"--output {output} is also an input: give another file")
    if output.is_dir():
        raise DataError(f"--output {output} is a folder: give the file to write, such as {output / 'train.jsonl'}")
    if image_folder.exists() and not image_folder.is_dir():
        raise DataError(f"--image-folder {image_folder} is a file: give a folder")
