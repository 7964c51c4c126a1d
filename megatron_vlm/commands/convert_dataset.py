"""Convert another dataset to LLaVA annotations and image files.

megatron-vlm convert-dataset qa --input data.parquet --output annotations.jsonl --image-folder images
megatron-vlm convert-dataset KIND --help

Input files are .json, .jsonl, .csv, .tsv (also .gz of these) or .parquet (as on Hugging Face, with image bytes
inside). Every entry is validated as training data is. Rows that cannot be converted are counted by reason and listed in
OUTPUT.quarantine.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from megatron_vlm.commands.failures import describe
from megatron_vlm.commands.job_flag import add_job_flag
from megatron_vlm.commands.max_rejected import add_max_rejected_flag
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.prepare import video_converter  # noqa: F401  (registers it)
from megatron_vlm.data.prepare.conversion import ConversionSummary, check_paths, convert, quarantine_of
from megatron_vlm.data.prepare.converters import CONVERTERS
from megatron_vlm.data.prepare.image_store import ImageStore


def _load_plugins(argv: list[str]) -> None:
    """Import the --plugin files, whose converters add subcommands, before the command line is parsed."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--plugin", action="append", default=[])
    for path in parser.parse_known_args(argv)[0].plugin:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        if spec is None or spec.loader is None or not Path(path).is_file():
            raise DataError(f"--plugin {path}: no such Python file. Give a file that ends in .py.")
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except Exception as error:  # whatever the user's code raises
            raise DataError(f"--plugin {path}: {type(error).__name__}: {error}") from error


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
        add_max_rejected_flag(own)
        own.add_argument("--plugin", action="append", metavar="FILE.py", help="a file that registers more kinds")
        converter.add_arguments(own)
    return parser


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code: 0 entries were written, 1 none, or too many rows were rejected, 2 error."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        _load_plugins(arguments)
        options = _parser(prog).parse_args(arguments)
        check_paths(options.input, options.output, options.image_folder)
        converter, images = CONVERTERS[options.kind](options), ImageStore(options.image_folder)
        summary = convert(converter, options.input, options.output, images, options.job)
    except (DataError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    return _report(summary, options)


def _report(summary: ConversionSummary, options: argparse.Namespace) -> int:
    rejected = summary.rejected.total()
    print(
        f"{summary.read} samples read = {summary.converted} converted + {rejected} rejected; "
        f"{summary.written} entries written to {options.output}"
    )
    if rejected:
        print(f"WARNING: rejected rows are listed in {quarantine_of(options.output)}", file=sys.stderr)
    for reason, count in summary.rejected.most_common():
        print(f"  {count:8d}  {reason}", file=sys.stderr)
    if not summary.read:
        print(f"error: no row in {', '.join(map(str, options.input))}. Give a table with rows.", file=sys.stderr)
    exceeded = options.max_rejected.report(rejected, summary.read)
    return 0 if summary.written and not exceeded else 1
