"""Megatron -> Hugging Face.

python -m checkpoint_convert.megatron_to_hf --load DIR --save DIR --format llava_next|instellavl|projector|peft
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
from checkpoint_convert.huggingface.peft import write_adapter
from checkpoint_convert.huggingface.projector import write_projector
from checkpoint_convert.huggingface.safetensors import SHARD_BYTES, TensorSpec, write_weights
from checkpoint_convert.mapping.hf_names import instellavl_name
from checkpoint_convert.mapping.lora import WithoutAdapters, peft_tensors
from checkpoint_convert.mapping.param_map import HuggingFaceTensors, hf_shapes, param_map
from checkpoint_convert.megatron.files import (
    checkpoint_progress,
    checkpoint_recipe,
    checkpoint_tensors,
    stored_tensors,
    trained_recipe,
)
from megatron_vlm.commands.number_flags import positive_number
from megatron_vlm.config import TrainingConfig
from megatron_vlm.config.lora import uses_lora
from megatron_vlm.data.errors import DataError
from megatron_vlm.data.processing.tokenizer import Tokenizer, load_tokenizer

DESCRIPTION = "Megatron -> Hugging Face: a checkpoint as a folder that transformers loads."
FORMATS = ("llava_next", "instellavl", "projector", "peft")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    load: Path,
    save: Path,
    tokenizer: Path | None = None,
    format: str = "llava_next",
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    merge_lora: bool = True,
) -> None:
    """Export the newest checkpoint in `load` to a folder that transformers loads.

    Args:
        load: checkpoint folder, the --save of the training.
        save: folder to create.
        tokenizer: by default the one that is stored with the checkpoint.
        format: llava_next, which stock transformers reads; instellavl, the published format, with its own code;
            projector, the projector alone, as LLaVA saves it; or peft, the LoRA adapter alone, which peft loads onto a
            llava_next model that was exported without it.
        dtype: dtype of the weights; by default the checkpoint's.
        shard_bytes: a larger model is written as several files.
        merge_lora: add LoRA adapters to the weights; otherwise they are left out.

    Raises:
        ConversionError: no checkpoint, or one that cannot be read or expressed in this format.
    """
    recipe = checkpoint_recipe(load)
    dtype = dtype or (torch.bfloat16 if recipe.training.bf16 else torch.float32)
    entries = param_map(recipe.model)
    if format == "peft" or not merge_lora:
        training = _with_lora(load)
    if format == "peft":
        with new_folder(save) as staging_dir:
            write_adapter(staging_dir, training, peft_tensors(entries, stored_tensors(load)), dtype)
        return
    tensors = checkpoint_tensors(load) if merge_lora else WithoutAdapters(entries, stored_tensors(load))
    weights = HuggingFaceTensors(entries, tensors, str(load))
    if format == "projector":
        with new_folder(save) as staging_dir:
            write_projector(staging_dir, weights, dtype)
        return
    stored_tokenizer = _load_tokenizer(tokenizer or load / "tokenizer")
    aspect_ratio = recipe.data.image_aspect_ratio
    if format == "llava_next" and aspect_ratio != "anyres":
        print(
            f"note: trained with image_aspect_ratio = {aspect_ratio}; llava_next has no such setting "
            "and tiles every image as anyres does",
            file=sys.stderr,
        )
    elif format == "llava_next" and recipe.data.multi_image_aspect_ratio == "pad":
        print(
            "note: trained with multi_image_aspect_ratio = pad; llava_next tiles the images of a prompt with several, "
            "too, so give it one image, or train with same",
            file=sys.stderr,
        )
    with new_folder(save) as staging_dir:
        if format == "instellavl":
            instellavl.write_configs(staging_dir, recipe.model, stored_tokenizer, dtype, aspect_ratio)
        else:
            llava_next.write_configs(staging_dir, recipe.model, stored_tokenizer, dtype)
        rename = instellavl_name if format == "instellavl" else str
        plan = [TensorSpec(rename(name), shape, dtype) for name, shape in hf_shapes(entries).items()]
        named = ((rename(name), tensor) for name, tensor in weights.items())
        write_model_card(staging_dir, save.name, load, trained_recipe(load), checkpoint_progress(load), format, plan)
        write_weights(named, staging_dir, shard_bytes, plan)


def _with_lora(load: Path) -> TrainingConfig:
    training = trained_recipe(load).training
    if not uses_lora(training):
        raise ConversionError(
            f"{load} has no LoRA adapter: it was trained with trainable: [{', '.join(training.trainable)}]. Export the "
            "model with --format llava_next, without --no-merge-lora"
        )
    return training


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return load_tokenizer(path)
    except DataError as error:
        raise ConversionError(f"{error}; give the tokenizer of the training with --tokenizer") from error


def main(argv: list[str] | None = None, prog: str = "python -m checkpoint_convert.megatron_to_hf") -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog, description=DESCRIPTION)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--save", type=Path, required=True, help="Hugging Face folder to create")
    parser.add_argument("--format", required=True, choices=FORMATS, help="format of the folder")
    parser.add_argument("--tokenizer", type=Path, help="default: the one that is stored with the checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights; default: the checkpoint's")
    parser.add_argument(
        "--no-merge-lora", action="store_true", help="leave a LoRA adapter out, which --format peft writes"
    )
    parser.add_argument(
        "--shard-gb",
        type=positive_number,
        default=SHARD_BYTES / 2**30,
        metavar="X",
        help="largest file in GiB; default 5",
    )
    args = parser.parse_args(argv)

    def command() -> None:
        dtype = DTYPES[args.dtype] if args.dtype else None
        shard_bytes = int(args.shard_gb * 2**30)
        convert(args.load, args.save, args.tokenizer, args.format, dtype, shard_bytes, not args.no_merge_lora)
        print(f"wrote {args.save}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
