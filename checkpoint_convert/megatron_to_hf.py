"""Megatron -> Hugging Face.

python -m checkpoint_convert.megatron_to_hf --load DIR --save DIR --format llava_next|instellavl|projector
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from checkpoint_convert.errors import ConversionError, run_command
from checkpoint_convert.folder import new_folder
from checkpoint_convert.huggingface import instellavl, llava_next
from checkpoint_convert.huggingface.model_card import write_model_card
from checkpoint_convert.huggingface.projector import write_projector
from checkpoint_convert.huggingface.safetensors import SHARD_BYTES, Planned, write_weights
from checkpoint_convert.mapping.hf_names import instellavl_name
from checkpoint_convert.mapping.param_map import HuggingFaceTensors, name_map
from checkpoint_convert.megatron.files import (
    checkpoint_progress,
    checkpoint_recipe,
    checkpoint_tensors,
    trained_recipe,
)
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.processing.tokenizer import Tokenizer, load_tokenizer

DESCRIPTION = "Megatron -> Hugging Face: a checkpoint as a folder that transformers loads."
FORMATS = ("llava_next", "instellavl", "projector")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    load: Path,
    save: Path,
    tokenizer: Path | None = None,
    format: str = "llava_next",
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The newest checkpoint in `load` -> a folder that transformers loads.

    Args:
        load: checkpoint folder, as given to training as --save.
        save: the folder to make.
        tokenizer: by default the one that travels with the checkpoint.
        format: llava_next, which stock transformers reads; instellavl, the published layout, with its own code; or
            projector, the projector alone, as LLaVA's tools keep it.
        dtype: of the weights; by default as they are in the checkpoint.
        shard_bytes: a larger model is written as several files.
    """
    recipe = checkpoint_recipe(load)
    dtype = dtype or (torch.bfloat16 if recipe.training.bf16 else torch.float32)
    entries = name_map(recipe.model)
    weights = HuggingFaceTensors(entries, checkpoint_tensors(load), str(load))
    if format == "projector":
        with new_folder(save) as making:
            write_projector(making, weights, dtype)
        return
    words = _tokenizer(tokenizer or load / "tokenizer")
    aspect_ratio = recipe.data.image_aspect_ratio
    if format == "llava_next" and aspect_ratio != "anyres":
        print(
            f"note: trained with image_aspect_ratio = {aspect_ratio}; llava_next has no such setting "
            "and tiles every image as anyres does",
            file=sys.stderr,
        )
    shapes = {name: shape for entry in entries for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)}
    with new_folder(save) as making:
        if format == "instellavl":
            instellavl.write_companions(making, recipe.model, words, dtype, aspect_ratio)
            named = ((instellavl_name(name), tensor) for name, tensor in weights.items())
            shapes = {instellavl_name(name): shape for name, shape in shapes.items()}
        else:
            llava_next.write_companions(making, recipe.model, words, dtype)
            named = ((name, tensor) for name, tensor in weights.items())
        plan = [Planned(name, shape, dtype) for name, shape in shapes.items()]
        write_model_card(making, save.name, load, trained_recipe(load), checkpoint_progress(load), format, plan)
        write_weights(named, making, shard_bytes, plan)


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return load_tokenizer(path)
    except DataError as error:
        raise ConversionError(f"{error}; name the tokenizer the checkpoint was trained with: --tokenizer") from error


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_convert.megatron_to_hf", description=DESCRIPTION)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--save", type=Path, required=True, help="Hugging Face folder to make")
    parser.add_argument("--format", required=True, choices=FORMATS, help="dialect of the folder")
    parser.add_argument("--tokenizer", type=Path, help="default: the one that travels with the checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the checkpoint's")
    parser.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 2**30, help="largest file, GiB; default 5")
    args = parser.parse_args(argv)

    def command() -> None:
        dtype = DTYPES[args.dtype] if args.dtype else None
        convert(args.load, args.save, args.tokenizer, args.format, dtype, int(args.shard_gb * 2**30))
        print(f"wrote {args.save}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
