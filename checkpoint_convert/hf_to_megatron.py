"""Hugging Face -> Megatron.

python -m checkpoint_convert.hf_to_megatron --vision-model DIR --language-model DIR [--projector FILE] --save DIR
python -m checkpoint_convert.hf_to_megatron --model DIR [--adapter DIR] --save DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from checkpoint_convert.errors import ConversionError, run_command
from checkpoint_convert.folder import new_folder
from checkpoint_convert.huggingface.peft import read_adapter
from checkpoint_convert.huggingface.tokenizer import check_image_token, import_tokenizer
from checkpoint_convert.mapping.param_map import param_map
from checkpoint_convert.megatron.files import write_model
from checkpoint_convert.merge import merge, report_saved
from checkpoint_convert.model_source import VLM_FORMATS, open_source

DESCRIPTION = "Hugging Face -> Megatron: a whole VLM, or a vision tower and a language model, as a checkpoint."


def convert_vlm(folder: Path, save: Path, tokenizer: Path | None = None, adapter: Path | None = None) -> None:
    """Convert a folder of a whole VLM to a checkpoint.

    Args:
        folder: a `llava_next`, `llava_onevision` or `instellavl` folder.
        save: checkpoint folder to create.
        tokenizer: Hugging Face folder or sentencepiece file; by default the folder's own.
        adapter: peft's folder of a LoRA adapter of its language model, which is kept apart from the weights.

    Raises:
        ConversionError: the folder is not a whole VLM, cannot be read, or its parts or the adapter do not match.
    """
    source = open_source(folder, tokenizer)
    if source.model is None or source.format not in VLM_FORMATS:
        raise ConversionError(
            f"{folder} ({source.format}) is not a Hugging Face folder of a whole VLM. Give one, or a vision tower and "
            "a language model as --vision-model and --language-model; a checkpoint needs no import"
        )
    read = read_adapter(adapter, source.model, str(folder)) if adapter else None
    with new_folder(save) as staging_dir:
        imported = import_tokenizer(tokenizer or folder, staging_dir / "tokenizer")
        check_image_token(imported, source.model, str(folder))
        write_model(
            staging_dir,
            save,
            source.model,
            param_map(source.model),
            source.tensors,
            str(folder),
            imported.fingerprint,
            source.aspect_ratio,
            read,
        )


def main(argv: list[str] | None = None, prog: str = "python -m checkpoint_convert.hf_to_megatron") -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog, description=DESCRIPTION)
    parser.add_argument("--model", type=Path, help="folder of a whole VLM: llava_next, llava_onevision, instellavl")
    parser.add_argument("--vision-model", type=Path, help="folder of a vision tower: CLIP or SigLIP")
    parser.add_argument("--language-model", type=Path, help="folder of a language model: OLMo, Llama, Mistral, Qwen2")
    parser.add_argument("--projector", type=Path, help="with these two: mm_projector.bin, or another source of one")
    parser.add_argument("--adapter", type=Path, help="folder of peft's LoRA adapter of the language model, to train on")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder or .model file; default: the model's own")
    parser.add_argument("--save", type=Path, required=True, help="checkpoint folder to create")
    args = parser.parse_args(argv)
    whole, parts = args.model is not None, (args.vision_model is not None, args.language_model is not None)
    if whole == any(parts) or (any(parts) and not all(parts)):
        parser.error("give either --model, or --vision-model and --language-model")
    if whole and args.projector:
        parser.error(
            "--projector goes with --vision-model and --language-model; to replace the projector of a whole model, "
            "use checkpoint_convert.merge"
        )

    def command() -> None:
        initialised: list[str] = []
        if whole:
            convert_vlm(args.model, args.save, args.tokenizer, args.adapter)
        else:
            initialised = merge(
                args.vision_model, args.language_model, args.projector, args.save, args.tokenizer, args.adapter
            )
        report_saved(initialised, args.save)
        if args.adapter:
            print(f"train its adapter on with --pretrained-checkpoint {args.save} --trainable projector language_lora")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
