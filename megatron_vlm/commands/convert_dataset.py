"""Convert another dataset to LLaVA annotations and image files.

megatron-vlm convert-dataset qa --input data.parquet --output annotations.jsonl --image-folder images
megatron-vlm convert-dataset KIND --help

Input files are .json, .jsonl, .csv, .tsv or .parquet (as on Hugging Face, with image bytes inside). Rows that cannot
be converted are counted by reason and listed in OUTPUT.quarantine.jsonl.
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

from megatron_vlm.commands.job_flag import add_job_flag
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.prepare.converters import CONVERTERS
from megatron_vlm.data.prepare.tables import ImageStore, RowError, read_rows
from megatron_vlm.runtime.atomic_files import atomic_file


def _load_plugins(argv: list[str]) -> None:
    """Import the --plugin files, whose converters add subcommands, before the command line is parsed."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--plugin", action="append", default=[])
    for path in parser.parse_known_args(argv)[0].plugin:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        if spec is None or spec.loader is None or not Path(path).is_file():
            raise DataError(f"--plugin {path}: no such Python file")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, converter in CONVERTERS.items():
        about = (converter.__doc__ or "").splitlines()[0]
        own = kinds.add_parser(name, help=about, description=about)
        own.add_argument("--input", nargs="+", type=Path, required=True, metavar="FILE")
        own.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
        own.add_argument("--image-folder", type=Path, required=True, metavar="DIR", help="folder of the image files")
        add_job_flag(own, "convert every n-th row from the k-th, k from 1", default=(1, 1))
        own.add_argument("--plugin", action="append", metavar="FILE.py", help="a file that registers more kinds")
        converter.add_arguments(own)
    return parser


def convert(options: argparse.Namespace) -> tuple[int, int, Counter[str]]:
    """Write the output file atomically. Returns rows read, entries written, and rows rejected by reason."""
    converter, images = CONVERTERS[options.kind](options), ImageStore(options.image_folder)
    rejected: Counter[str] = Counter()
    listed: list[dict[str, Any]] = []
    read = written = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal read
        k, n = options.job
        for path in options.input:
            for row in islice(read_rows(path), k - 1, None, n):
                read += 1
                if isinstance(row, dict):
                    yield row
                else:
                    on_error({"row": row}, RowError("no row", f"expected an object, got {type(row).__name__}"))

    def on_error(row: dict[str, Any], error: RowError) -> None:
        rejected[error.reason] += 1
        listed.append({"row": {name: repr(value)[:200] for name, value in row.items()}, "message": str(error)})

    with atomic_file(options.output) as file:
        for entry in converter.entries(rows(), images, on_error):
            k, n = options.job
            entry = {"id": f"{options.output.stem}-{written * n + k - 1}", **entry}
            file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            written += 1
    if listed:
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in listed)
        Path(f"{options.output}.quarantine.jsonl").write_text(lines, encoding="utf-8")
    return read, written, rejected


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code: 0 rows were converted, 1 none, 2 error."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        _load_plugins(arguments)
        options = _parser(prog).parse_args(arguments)
        read, written, rejected = convert(options)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{read} rows read, {written} entries written to {options.output}, {rejected.total()} rows rejected")
    for reason, count in rejected.most_common():
        print(f"  {count:8d}  {reason}", file=sys.stderr)
    return 0 if written else 1
