"""Hugging Face -> Megatron.

python -m checkpoint_convert.hf_to_megatron --vision-model DIR --language-model DIR --save DIR
python -m checkpoint_convert.hf_to_megatron --model DIR --save DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from checkpoint_convert.errors import ConversionError, run_command
from checkpoint_convert.folder import new_folder
from checkpoint_convert.hf_config import (
    language_from_hf,
    model_from_llava_next,
    model_from_parts,
    read_config,
    vision_from_hf,
)
from checkpoint_convert.instellavl import model_from_instellavl
from checkpoint_convert.megatron_files import write_checkpoint
from checkpoint_convert.name_map import Entry, MegatronTensors, name_map
from checkpoint_convert.stored import JoinedTensors, StoredTensors
from checkpoint_convert.tokenizer_files import check_image_token, import_tokenizer
from checkpoint_convert.weights import FolderTensors
from megatron_vlm.config import ModelConfig, Recipe
from megatron_vlm.config.check_model import check_language, check_vision

DESCRIPTION = (
    "Hugging Face -> Megatron: a llava_next or instellavl folder, or a CLIP tower and an OLMo model, as a checkpoint."
)


def convert_parts(vision: Path, language: Path, save: Path, tokenizer: Path | None = None) -> list[str]:
    """A CLIP tower and an OLMo model -> a checkpoint of one VLM. The projector and the newline between them are drawn.

    Args:
        vision: folder of a CLIPVisionModel or CLIPModel.
        language: folder of an OlmoForCausalLM.
        save: the checkpoint folder to make.
        tokenizer: Hugging Face folder or sentencepiece file; by default the language model's own.

    Returns:
        Names of the tensors that were drawn.
    """
    vision_config = vision_from_hf(read_config(vision), str(vision / "config.json"))
    language_config = language_from_hf(read_config(language), str(language / "config.json"))
    with new_folder(save) as making:
        words = import_tokenizer(tokenizer or language, making / "tokenizer")
        model = model_from_parts(vision_config, language_config, image_token_index=len(words))
        check_image_token(words, model, str(language))
        towers = FolderTensors(vision, "vision")
        decoder = _without_tied_head(FolderTensors(language, "language"), model)
        source = f"{vision} with {language}"
        entries = [entry for entry in name_map(model) if not _between_the_parts(entry)]
        return _write(making, save, model, entries, JoinedTensors(towers, decoder), source, words.fingerprint)


def convert_whole(folder: Path, save: Path, tokenizer: Path | None = None) -> list[str]:
    """A `llava_next` or `instellavl` folder -> a checkpoint. Arguments as in convert_parts; nothing is drawn."""
    config, source = read_config(folder), str(folder / "config.json")
    published = config.get("model_type") == "instellavl"
    with new_folder(save) as making:
        words = import_tokenizer(tokenizer or folder, making / "tokenizer")
        aspect_ratio = "anyres"
        if published:
            model, aspect_ratio = model_from_instellavl(config, source, image_token_index=len(words))
        else:
            model = model_from_llava_next(config, source)
        check_image_token(words, model, str(folder))
        tensors = _without_tied_head(FolderTensors(folder, "instellavl" if published else "whole"), model)
        return _write(making, save, model, name_map(model), tensors, str(folder), words.fingerprint, aspect_ratio)


def _between_the_parts(entry: Entry) -> bool:
    return entry.megatron.startswith(("projector.", "image_newline"))


def _without_tied_head(tensors: FolderTensors, model: ModelConfig) -> FolderTensors:
    if model.language.tie_word_embeddings:
        tensors.discard("language_model.lm_head.weight")  # some writers store the embedding twice
    return tensors


def _write(
    making: Path,
    save: Path,
    model: ModelConfig,
    entries: list[Entry],
    tensors: StoredTensors,
    source: str,
    fingerprint: str,
    aspect_ratio: str = "anyres",
) -> list[str]:
    recipe = Recipe(model=model)
    recipe.data.image_aspect_ratio = aspect_ratio
    recipe.data.tokenizer_model = str(save.absolute() / "tokenizer")
    # bf16 is kept as it is; half precision and mixtures become fp32, which holds them exactly.
    recipe.training.bf16 = all(tensors.dtype(name) == torch.bfloat16 for name in tensors)
    problems = [*check_vision(recipe), *check_language(recipe)]
    if problems:
        raise ConversionError(f"{source}: " + "; ".join(map(str, problems)))
    return write_checkpoint(making, recipe, MegatronTensors(entries, tensors, source), fingerprint)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_convert.hf_to_megatron", description=DESCRIPTION)
    parser.add_argument("--model", type=Path, help="folder of a whole VLM in llava_next or instellavl format")
    parser.add_argument("--vision-model", type=Path, help="folder of a CLIP tower")
    parser.add_argument("--language-model", type=Path, help="folder of an OLMo model")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder or .model file; default: the model's own")
    parser.add_argument("--save", type=Path, required=True, help="checkpoint folder to make")
    args = parser.parse_args(argv)
    whole, parts = args.model is not None, (args.vision_model is not None, args.language_model is not None)
    if whole == any(parts) or (any(parts) and not all(parts)):
        parser.error("give either --model, or --vision-model and --language-model")

    def command() -> None:
        if whole:
            drawn = convert_whole(args.model, args.save, args.tokenizer)
        else:
            drawn = convert_parts(args.vision_model, args.language_model, args.save, args.tokenizer)
        if drawn:
            print(f"drawn at random, to be trained: {', '.join(drawn)}")
        print(f"wrote {args.save}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
