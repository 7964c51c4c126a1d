"""The flag --max-rejected of commands that write data."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

DEFAULT = "50%"


@dataclass(frozen=True)
class MaxRejected:
    """How many samples may be rejected before a command ends with an error."""

    text: str

    def is_exceeded(self, rejected: int, read: int) -> bool:
        """Whether `rejected` of `read` samples are too many."""
        if self.text.endswith("%"):
            return rejected > float(self.text[:-1]) / 100 * read
        return rejected > int(self.text)

    def report(self, rejected: int, read: int) -> bool:
        """Print an error if too many samples are rejected. Returns whether they are."""
        exceeded = self.is_exceeded(rejected, read)
        if exceeded:
            limit = f"more than --max-rejected {self.text}"
            print(f"error: {rejected} of {read} samples were rejected, {limit}. Fix the data, or raise the limit.",
                  file=sys.stderr)  # fmt: skip
        return exceeded


def _parse(text: str) -> MaxRejected:
    number = text.removesuffix("%")
    try:
        valid = 0 <= float(number) <= 100 if text.endswith("%") else int(number) >= 0
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of samples, such as 10, or a share, such as 5%")
    return MaxRejected(text)


def add_max_rejected_flag(parser: argparse.ArgumentParser) -> None:
    """Add --max-rejected N|P%."""
    parser.add_argument(
        "--max-rejected", type=_parse, default=MaxRejected(DEFAULT), metavar="N|P%",
        help=f"exit code 1 if more samples are rejected; default: {DEFAULT.replace('%', '%%')}",
    )  # fmt: skip
