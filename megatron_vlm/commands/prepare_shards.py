"""Write MDS shards from LLaVA-style annotations and image files, to a folder or an S3 store.

python tools/prepare_shards.py --annotations train.json --image-folder images --output shards/train

Called again after it was stopped, it goes on. Several machines share one set with --part, for example in a Slurm array
of 8 jobs, and one call with --merge when all are done:

python tools/prepare_shards.py --annotations train.json --image-folder images --output s3://bucket/train --part 3/8
python tools/prepare_shards.py --output s3://bucket/train --merge
"""

from __future__ import annotations

import argparse
import logging
import sys

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.prepare.shard_writer import MOST_SAMPLES_PER_PART, PrepareSummary, merge_parts, prepare_shards


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected k/n, k from 1 to n")
    return int(part), int(parts)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if shards were written (perhaps without some quarantined samples), 1 if none, 2 for a wrong call,
    130 if it was stopped by Ctrl-C.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", nargs="+", metavar="PATH", help=".json or .jsonl files, or folders of them")
    parser.add_argument("--image-folder", metavar="DIR", help="folder that image paths start from")
    parser.add_argument("--output", required=True, metavar="DIR|s3://…", help="set of shards to be written")
    parser.add_argument("--processes", type=_positive, metavar="N", help="that decode images; default: all cores")
    parser.add_argument(
        "--size-limit", type=_positive, default=1 << 26, metavar="BYTES", help="of a shard; default: 64 MiB"
    )
    parser.add_argument(
        "--samples-per-part", type=_positive, metavar="N",
        help=f"what is not done again after a stop; default: a 16th of the set, at most {MOST_SAMPLES_PER_PART}",
    )  # fmt: skip
    parser.add_argument("--part", type=_part, metavar="k/n", help="only the k-th of n shares of the parts, k from 1")
    parser.add_argument("--merge", action="store_true", help="make the set of parts that were written with --part")
    options = parser.parse_args(argv)
    if options.merge == bool(options.annotations):
        parser.error("give either --annotations or --merge")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megatron_vlm").setLevel(logging.INFO)
    try:
        if options.merge:
            summary = merge_parts(options.output)
        else:
            summary = prepare_shards(
                options.annotations, options.image_folder, options.output, options.processes, options.size_limit,
                options.samples_per_part, options.part,
            )  # fmt: skip
    except (DataError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the parts that are missing", file=sys.stderr)
        return 130
    return _report(summary, options.output, options.part)


def _report(summary: PrepareSummary, output: str, part: tuple[int, int] | None) -> int:
    bad = sum(summary.quarantined.values())
    print(
        f"{summary.read} samples read = {summary.written} written with {summary.images} images + {bad} quarantined"
        + (f" -> {output}" if summary.written else "")
        + (f", part {part[0]} of {part[1]}; to be merged" if part else "")
    )
    if bad:
        where = summary.quarantine or "listed when the parts are merged"
        print(f"WARNING: {bad} samples are NOT in the shards; reasons are in {where}", file=sys.stderr)
        for reason, count in summary.quarantined.most_common():
            print(f"  {count:8d}  {reason}", file=sys.stderr)
    if not summary.written and not part:
        print("error: no sample is good; no shard was written", file=sys.stderr)
        return 1
    return 0
