"""Write MDS shards from LLaVA-style annotations and image files.

python tools/prepare_shards.py --annotations train.json --image-folder images --output shards/train
"""

from __future__ import annotations

import argparse
import logging
import sys

from megatron_vlm.data.errors import DataError
from megatron_vlm.data.prepare import prepare_shards


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if shards were written (perhaps without some quarantined samples), 1 if none, 2 for a wrong call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", nargs="+", required=True, metavar="FILE", help=".json or .jsonl files")
    parser.add_argument("--image-folder", metavar="DIR", help="folder that image paths start from")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of shards to be written")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that decode images; default: all cores")
    parser.add_argument("--size-limit", type=int, default=1 << 26, metavar="BYTES", help="of a shard; default: 64 MiB")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        summary = prepare_shards(
            options.annotations, options.image_folder, options.output, options.processes, options.size_limit
        )
    except (DataError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bad = sum(summary.quarantined.values())
    print(
        f"{summary.read} samples read = {summary.written} written with {summary.images} images + {bad} quarantined"
        + (f" -> {options.output}" if summary.written else "")
    )
    if bad:
        print(f"WARNING: {bad} samples are NOT in the shards; reasons are in {summary.quarantine}", file=sys.stderr)
        for reason, count in summary.quarantined.most_common():
            print(f"  {count:8d}  {reason}", file=sys.stderr)
    if not summary.written:
        print("error: no sample is good; no shard was written", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
