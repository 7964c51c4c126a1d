"""Make the folders that the published mixes expect, and say where each data set comes from.

megatron-vlm make-data-folders --stage warmup --data-root DIR

Put a set's annotations and images into DIR/raw/STAGE/NAME; --commands prints what makes shards of them all, at the
paths that examples/instellavl/mixes/STAGE.yaml names below DIR. Without --data-root nothing is made.
"""

from __future__ import annotations

import argparse
import csv
import shlex
from pathlib import Path

SETS = Path(__file__).with_name("datasets.csv")
STAGES = ("warmup", "pretrain", "instruct")


def read_sets(stage: str | None = None) -> list[dict[str, str]]:
    """Rows of datasets.csv: stage, name, published_name, domain, examples_of_domain, licence, page.

    `examples_of_domain` is of all sets of that stage and domain together; what the published tables do not tell is
    empty.
    """
    with SETS.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if stage in (None, row["stage"])]


def describe(sets: list[dict[str, str]]) -> str:
    """A table of where sets come from."""
    rows = [("stage", "data set", "domain", "licence", "page")]
    for row in sets:
        page = row["page"] or "not named in the published tables"
        rows.append((row["stage"], row["name"], row["domain"], row["licence"], page))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def commands(sets: list[dict[str, str]], root: str) -> list[str]:
    """For each set, what makes shards of its annotations and images."""
    out = []
    for row in sets:
        raw = Path(root, "raw", row["stage"], row["name"])
        words = ["megatron-vlm", "prepare-shards", "--annotations", raw, "--image-folder", raw / "images",
                 "--output", Path(root, row["stage"], row["name"])]  # fmt: skip
        out.append(shlex.join(map(str, words)))
    return out


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, help="default: all three")
    parser.add_argument("--data-root", metavar="DIR", help="where folders are made")
    parser.add_argument("--commands", action="store_true", help="print the commands that make shards")
    options = parser.parse_args(argv)
    sets = read_sets(options.stage)
    if options.commands:
        print("\n".join(commands(sets, options.data_root or ".")))
        return 0
    print(describe(sets))
    if options.data_root:
        for row in sets:
            Path(options.data_root, "raw", row["stage"], row["name"], "images").mkdir(parents=True, exist_ok=True)
        print(f"\n{len(sets)} folders in {Path(options.data_root, 'raw')}")
    return 0
