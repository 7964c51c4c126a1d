"""List the parallel layouts of a recipe that fit on some GPUs, fastest first. Needs no GPU and no data.

megatron-vlm plan-layout --gpus 64 --device MI300X --config RECIPE.yaml
megatron-vlm plan-layout --gpus 8 --device H100 --memory-gb 40 --tiles-per-row 51 --config RECIPE.yaml

For each layout: time of a step, tokens per second, MFU, the share of waiting in the pipeline, bytes that a rank sends
in a step, and bytes on the fullest rank. Rows are taken to be full of images, unless --tiles-per-row says otherwise.
All training flags are accepted (--global-batch-size, --seq-length, --bf16, ...).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from megatron_vlm.commands.number_flags import number_from_0, positive_int, positive_number
from megatron_vlm.config import ConfigError, Recipe, check_recipe, parse_command_line
from megatron_vlm.planner.devices import DEVICES, GB, USABLE_MEMORY
from megatron_vlm.planner.report import describe_plan, table
from megatron_vlm.planner.row_work import RowShape
from megatron_vlm.planner.search import best_layouts


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code: 0, 1 if no layout fits, 2 if the recipe or an argument is wrong."""
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gpus", type=positive_int, required=True, metavar="N", help="number of GPUs")
    parser.add_argument("--device", choices=DEVICES, default="MI300X", help="kind of GPU; default: MI300X")
    parser.add_argument(
        "--memory-gb", type=positive_number, metavar="GB", help="memory of a GPU; default: the device's"
    )
    parser.add_argument("--tiles-per-row", type=number_from_0, metavar="N", help="tiles of an average row")
    parser.add_argument(
        "--document-tokens", type=positive_number, metavar="N", help="length of the document of a token"
    )
    parser.add_argument("--top", type=positive_int, default=10, metavar="N", help="layouts to list; default: 10")
    options, rest = parser.parse_known_args(argv)
    try:
        recipe, _ = parse_command_line(rest)
        check_recipe(_on_one_rank(recipe), 1)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    device, shape = DEVICES[options.device], RowShape.of_recipe(recipe)
    if options.memory_gb is not None:
        device = replace(device, memory=options.memory_gb * GB)
    if options.tiles_per_row is not None:
        shape = replace(shape, tiles=options.tiles_per_row)
    if options.document_tokens is not None:
        shape = replace(shape, document_tokens=options.document_tokens)
    found = best_layouts(recipe, options.gpus, device, shape)
    print(describe_plan(_on_one_rank(recipe), 1, shape)[0])
    print(
        f"rows       {recipe.training.global_batch_size} a step, of {shape.tokens} tokens and {shape.tiles:.0f} tiles, "
        f"documents of {shape.document_tokens:.0f} tokens"
    )
    if not found:
        print(
            f"no layout fits into {USABLE_MEMORY:.0%} of {device.memory / GB:.0f} GB on {options.gpus} GPUs with "
            f"{recipe.training.global_batch_size} rows a step. Use more GPUs, a global_batch_size that is divisible by "
            "more data-parallel ranks, or a smaller seq_length.",
            file=sys.stderr,
        )
        return 1
    print(f"layouts    {len(found)} fit on {options.gpus} x {device.name}; the {min(options.top, len(found))} fastest:")
    print(table(found[: options.top]))
    return 0


def _on_one_rank(recipe: Recipe) -> Recipe:
    """The recipe without its parallel sizes, which the search replaces."""
    sizes: dict[str, Any] = {
        "tensor_model_parallel_size": 1,
        "context_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": 1,
    }
    return replace(recipe, parallel=replace(recipe.parallel, **sizes, pipeline_model_parallel_layout=None))


if __name__ == "__main__":
    sys.exit(main())
