"""Hugging Face -> Megatron.

python -m checkpoint_convert.hf_to_megatron --vision-model DIR --language-model DIR [--projector FILE] --save DIR
python -m checkpoint_convert.hf_to_megatron --model DIR --save DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from checkpoint_convert.errors import run_command
from checkpoint_convert.folder import new_folder
from checkpoint_convert.huggingface.config import read_config
from checkpoint_convert.huggingface.tokenizer import check_image_token, import_tokenizer
from checkpoint_convert.mapping.param_map import name_map
from checkpoint_convert.megatron.files import write_model
from checkpoint_convert.merge import merge, tell_made
from checkpoint_convert.model_source import describe_whole, whole_tensors

DESCRIPTION = "Hugging Face -> Megatron: a whole VLM, or a vision tower and a language model, as a checkpoint."


def convert_whole(folder: Path, save: Path, tokenizer: Path | None = None) -> list[str]:
    """A `llava_next`, `llava_onevision` or `instellavl` folder -> a checkpoint.

    Arguments and errors as those of merge.merge; nothing is drawn.
    """
    config = read_config(folder)
    with new_folder(save) as making:
        words = import_tokenizer(tokenizer or folder, making / "tokenizer")
        model, aspect_ratio = describe_whole(folder, config, len(words))
        check_image_token(words, model, str(folder))
        tensors = whole_tensors(folder, config, model)
        return write_model(making, save, model, name_map(model), tensors, str(folder), words.fingerprint, aspect_ratio)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_convert.hf_to_megatron", description=DESCRIPTION)
    parser.add_argument("--model", type=Path, help="folder of a whole VLM: llava_next, llava_onevision, instellavl")
    parser.add_argument("--vision-model", type=Path, help="folder of a tower: CLIP or SigLIP")
    parser.add_argument("--language-model", type=Path, help="folder of a decoder: OLMo, Llama, Mistral, Qwen2")
    parser.add_argument("--projector", type=Path, help="with these: mm_projector.bin, or where else to take it from")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder or .model file; default: the model's own")
    parser.add_argument("--save", type=Path, required=True, help="checkpoint folder to make")
    args = parser.parse_args(argv)
    whole, parts = args.model is not None, (args.vision_model is not None, args.language_model is not None)
    if whole == any(parts) or (any(parts) and not all(parts)):
        parser.error("give either --model, or --vision-model and --language-model")
    if whole and args.projector:
        parser.error(
            "--projector goes with --vision-model and --language-model; to put another projector into a whole "
            "model, use checkpoint_convert.merge"
        )

    def command() -> None:
        if whole:
            drawn = convert_whole(args.model, args.save, args.tokenizer)
        else:
            drawn = merge(args.vision_model, args.language_model, args.projector, args.save, args.tokenizer)
        tell_made(drawn, args.save)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
