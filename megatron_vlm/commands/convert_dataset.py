"""Make LLaVA annotations and image files of somebody else's data set.

python tools/convert_dataset.py qa --input data.parquet --output annotations.jsonl --image-folder images
python tools/convert_dataset.py KIND --help

Input is .json, .jsonl, .csv, .tsv or .parquet (Hugging Face's, with image bytes inside). Rows that cannot be converted
are counted by reason and listed in OUTPUT.quarantine.jsonl. --part k/n converts every n-th row from the k-th on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.prepare.converters import KINDS
from megatron_vlm.data.prepare.tables import ImageStore, RowError, read_rows
from megatron_vlm.runtime.atomic_files import atomic_file


def _load_plugins(argv: list[str]) -> None:
    """Kinds of other files must be known before the command line is read."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--plugin", action="append", default=[])
    for path in parser.parse_known_args(argv)[0].plugin:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        if spec is None or spec.loader is None or not Path(path).is_file():
            raise DataError(f"--plugin {path}: there is no such Python file")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected k/n, k from 1 to n")
    return int(part), int(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, kind in KINDS.items():
        about = (kind.__doc__ or "").splitlines()[0]
        own = kinds.add_parser(name, help=about, description=about)
        own.add_argument("--input", nargs="+", type=Path, required=True, metavar="FILE")
        own.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
        own.add_argument("--image-folder", type=Path, required=True, metavar="DIR", help="where image files lie or go")
        own.add_argument("--part", type=_part, default=(1, 1), metavar="k/n", help="every n-th row from the k-th on")
        own.add_argument("--plugin", action="append", metavar="FILE.py", help="a file with more kinds")
        kind.add_arguments(own)
    return parser


def convert(options: argparse.Namespace) -> tuple[int, int, Counter[str]]:
    """Returns rows read, entries written, and rows refused by reason. The output appears when it is whole."""
    converter, images = KINDS[options.kind](options), ImageStore(options.image_folder)
    refused: Counter[str] = Counter()
    listed: list[dict[str, Any]] = []
    read = written = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal read
        k, n = options.part
        for path in options.input:
            for row in islice(read_rows(path), k - 1, None, n):
                read += 1
                if isinstance(row, dict):
                    yield row
                else:
                    problem({"row": row}, RowError("no row", f"{type(row).__name__} where an object is expected"))

    def problem(row: dict[str, Any], error: RowError) -> None:
        refused[error.reason] += 1
        listed.append({"row": {name: repr(value)[:200] for name, value in row.items()}, "message": str(error)})

    with atomic_file(options.output) as file:
        for entry in converter.entries(rows(), images, problem):
            k, n = options.part
            entry = {"id": f"{options.output.stem}-{written * n + k - 1}", **entry}
            file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            written += 1
    if listed:
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in listed)
        Path(f"{options.output}.quarantine.jsonl").write_text(lines, encoding="utf-8")
    return read, written, refused


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if something was converted, 1 if nothing, 2 for a wrong call."""
    words = sys.argv[1:] if argv is None else argv
    try:
        _load_plugins(words)
        options = _parser().parse_args(words)
        read, written, refused = convert(options)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{read} rows read, {written} entries written to {options.output}, {refused.total()} rows refused")
    for reason, count in refused.most_common():
        print(f"  {count:8d}  {reason}", file=sys.stderr)
    return 0 if written else 1
