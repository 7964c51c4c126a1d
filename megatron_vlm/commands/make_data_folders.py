"""List the datasets of the published mixtures with licence and web page, and create folders for them.

megatron-vlm make-data-folders --stage warmup --data-root DIR

Put the annotations and images of a dataset into DIR/raw/STAGE/NAME. --commands prints the commands that write them as
shards to the paths in examples/instellavl/mixes/STAGE.yaml. Without --data-root no folder is created.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
from importlib import resources
from pathlib import Path

from megatron_vlm.commands.failures import describe as describe_error

STAGES = ("warmup", "pretrain", "instruct")


def read_datasets(stage: str | None = None) -> list[dict[str, str]]:
    """Rows of published_datasets.csv: stage, name, published_name, domain, examples_of_domain, licence, page.

    `examples_of_domain` counts all datasets of that stage and domain. Values missing in the published tables are empty.
    """
    table = (resources.files("megatron_vlm.commands") / "published_datasets.csv").read_text(encoding="utf-8")
    return [row for row in csv.DictReader(table.splitlines()) if stage in (None, row["stage"])]


def describe(datasets: list[dict[str, str]]) -> str:
    """A table with the domain, licence and web page of each dataset."""
    rows = [("stage", "dataset", "domain", "licence", "page")]
    for row in datasets:
        page = row["page"] or "not in the published tables"
        rows.append((row["stage"], row["name"], row["domain"], row["licence"], page))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def commands(datasets: list[dict[str, str]], root: str) -> list[str]:
    """The commands that write the annotations and images of each dataset as shards."""
    out = []
    for row in datasets:
        raw = Path(root, "raw", row["stage"], row["name"])
        command = ["megatron-vlm", "prepare-shards", "--annotations", raw, "--image-folder", raw / "images",
                   "--output", Path(root, row["stage"], row["name"])]  # fmt: skip
        out.append(shlex.join(map(str, command)))
    return out


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code: 0, or 2 if a folder cannot be created."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, help="default: all three")
    parser.add_argument("--data-root", metavar="DIR", help="root of the folders to create")
    parser.add_argument("--commands", action="store_true", help="print the commands that write the shards")
    options = parser.parse_args(argv)
    datasets = read_datasets(options.stage)
    if options.commands:
        print("\n".join(commands(datasets, options.data_root or ".")))
        return 0
    print(describe(datasets))
    if options.data_root:
        try:
            for row in datasets:
                Path(options.data_root, "raw", row["stage"], row["name"], "images").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"error: {describe_error(error)}", file=sys.stderr)
            return 2
        print(f"\n{len(datasets)} folders in {Path(options.data_root, 'raw')}")
    return 0
