"""Print one sample as the model sees it: token ids, labels, position ids and tiles.

megatron-vlm show-sample --config RECIPE.yaml --index 17
megatron-vlm show-sample --config RECIPE.yaml --id some_id --json

All training flags are accepted (--data-path, --tokenizer-model, --image-aspect-ratio, ...).
"""

from __future__ import annotations

import argparse
import json
import sys

from megatron_vlm.config import ConfigError, parse_command_line
from megatron_vlm.config.command_line import Complete, keep_given
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.report.inspection import DataView, SampleView

_MARKS = {"prompt": " ", "answer": "+", "image": "#"}


def describe(view: SampleView) -> str:
    """Human-readable text with one span per line. `+` marks supervised tokens, `#` image tokens."""
    labels = view.encoded.labels
    lines = [
        f"sample {view.number}: {view.sample.id!r} of {view.sample.file}",
        f"{len(labels)} tokens, {int((labels != -100).sum())} supervised (+), "
        f"{sum(image.num_tokens for image in view.images)} of images (#), "
        f"{sum(image.tiles for image in view.images)} tiles",
    ]
    for number, image in enumerate(view.images):
        grid = f"base view and {image.grid[0]} x {image.grid[1]} tiles" if image.grid[0] else "base view only"
        lines.append(
            f"image {number}: {image.name}, {image.size[0]}x{image.size[1]} pixels, {grid}, "
            f"positions {image.start} to {image.start + image.num_tokens - 1}"
        )
    lines.append("")
    for span in view.spans:
        ids = view.encoded.ids[span.start : span.stop].tolist()
        shown = " ".join(map(str, ids[:12])) + (f" ... {ids[-1]}" if len(ids) > 12 else "")
        lines.append(f"{_MARKS[span.kind]} {span.start:6d}-{span.stop - 1:<6d} {span.text!r}")
        lines.append(f"{'':17}ids {shown}")
    return "\n".join(lines)


def main(argv: list[str] | None = None, prog: str | None = None, complete: Complete = keep_given) -> int:
    """Exit code: 0, or 2 if the sample does not exist or is rejected. `complete` fills in settings not given."""
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--index", type=int, metavar="N", help="global sample number, from 0")
    which.add_argument("--id", metavar="ID", help="the first sample with this id")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options, rest = parser.parse_known_args(argv)
    try:
        recipe, parsed = parse_command_line(rest)
        complete(recipe, parsed.given)
        data = DataView(recipe)
        number = options.index if options.id is None else data.find(options.id)
        total = len(data.mixture.sources)
        if number is None or not 0 <= number < total:
            wanted = options.index if options.id is None else repr(options.id)
            raise DataError(
                f"there is no sample {wanted} among {total}. Give --index from 0 to {total - 1}, or another --id."
            )
        view = data.view(number)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output = json.dumps(view.as_dict(), ensure_ascii=False) if options.json else describe(view)
    print(output.encode("utf-8", "backslashreplace").decode())  # file names may hold lone surrogates
    return 0
