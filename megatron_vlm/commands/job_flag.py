"""The flag --job k/n, which splits the work of a command over several jobs."""

from __future__ import annotations

import argparse
from typing import Any


def add_job_flag(parser: argparse.ArgumentParser, text: str, **settings: Any) -> None:
    """Add --job with the help `text`. Its value is (k, n), 1 <= k <= n. --part is accepted as an older name."""
    parser.add_argument("--job", "--part", dest="job", type=_parse, metavar="k/n", help=text, **settings)


def _parse(text: str) -> tuple[int, int]:
    job, _, jobs = text.partition("/")
    if not (job.isdigit() and jobs.isdigit() and 1 <= int(job) <= int(jobs)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected k/n, k from 1 to n")
    return int(job), int(jobs)
