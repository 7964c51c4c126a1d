"""Write MDS shards from annotations with image files, Parquet files or WebDataset tars, to a folder or to S3.

megatron-vlm prepare-shards --annotations train.json --image-folder images --output shards/train

The same call resumes an interrupted run. --job splits a set over several jobs, for example a Slurm array of 8.
--merge completes the set when all of them have finished:

megatron-vlm prepare-shards --annotations train.json --image-folder images --output s3://bucket/train --job 3/8
megatron-vlm prepare-shards --output s3://bucket/train --merge
"""

from __future__ import annotations

import argparse
import logging
import sys

from megatron_vlm.commands.failures import describe
from megatron_vlm.commands.job_flag import add_job_flag
from megatron_vlm.commands.max_rejected import MaxRejected, add_max_rejected_flag
from megatron_vlm.commands.number_flags import positive_int
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.prepare.shard_writer import MAX_SAMPLES_PER_PART, PrepareSummary, merge_parts, prepare_shards


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code: 0 shards were written (some samples may be quarantined), 1 no sample is valid or too many are
    quarantined, 2 error, 130 Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--annotations", nargs="+", metavar="PATH", help=".json, .jsonl, .parquet or .tar files, or folders"
    )
    parser.add_argument("--image-folder", metavar="DIR", help="root of the image paths in annotations")
    parser.add_argument("--output", required=True, metavar="DIR|s3://…", help="shard set to write")
    parser.add_argument("--processes", type=positive_int, metavar="N", help="worker processes; default: one per core")
    parser.add_argument(
        "--size-limit",
        type=positive_int,
        default=1 << 26,
        metavar="BYTES",
        help="of a shard; default: 64 MiB",
    )
    parser.add_argument(
        "--samples-per-part", type=positive_int, metavar="N",
        help=f"samples written at a time; default: 1/16 of the set, at most {MAX_SAMPLES_PER_PART}",
    )  # fmt: skip
    add_job_flag(parser, "write only the samples of job k of n, k from 1")
    add_max_rejected_flag(parser)
    parser.add_argument("--merge", action="store_true", help="complete a set that was written with --job")
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
                options.samples_per_part, options.job,
            )  # fmt: skip
    except (DataError, ImportError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return 130
    return _report(summary, options.output, options.job, options.max_rejected)


def _report(summary: PrepareSummary, output: str, job: tuple[int, int] | None, max_rejected: MaxRejected) -> int:
    invalid = sum(summary.quarantined.values())
    print(
        f"{summary.read} samples read = {summary.written} written with {summary.images} images + {invalid} quarantined"
        + (f" -> {output}" if summary.written else "")
        + (f", job {job[0]} of {job[1]}; run --merge when all jobs have finished" if job else "")
    )
    if invalid:
        where = summary.quarantine or "the file that --merge writes"
        print(f"WARNING: {invalid} samples are NOT in the shards; reasons are in {where}", file=sys.stderr)
        for reason, count in summary.quarantined.most_common():
            print(f"  {count:8d}  {reason}", file=sys.stderr)
    if job:  # the set as a whole is judged when it is merged
        return 0
    if not summary.written:
        print("error: no sample is valid; no shard was written. Fix the data", file=sys.stderr)
        return 1
    return int(max_rejected.report(invalid, summary.read))
