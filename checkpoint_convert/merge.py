"""Parts of different checkpoints as one model.

python -m checkpoint_convert.merge --vision A --projector B --language C --save DIR

A, B and C are each a Megatron checkpoint or a Hugging Face folder of a whole VLM, of which one part is taken; A may be
a tower alone, C a decoder alone, B a projector alone, as `megatron_to_hf --format projector` writes it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from checkpoint_convert.errors import ConversionError, run_command
from checkpoint_convert.folder import new_folder
from checkpoint_convert.huggingface.config import model_from_parts
from checkpoint_convert.huggingface.tokenizer import check_image_token, import_tokenizer
from checkpoint_convert.mapping.lazy_tensors import ChosenTensors, JoinedTensors
from checkpoint_convert.mapping.param_map import name_map
from checkpoint_convert.megatron.files import write_model
from checkpoint_convert.model_source import PARTS, Source, open_source
from megatron_vlm.config import DataConfig, LanguageConfig, ModelConfig, VisionConfig

DESCRIPTION = "The tower, the projector and the decoder of different checkpoints as one Megatron checkpoint."
NEWLINE = "image_newline"


def merge(vision: Path, language: Path, projector: Path | None, save: Path, tokenizer: Path | None = None) -> list[str]:
    """One checkpoint of a tower, a projector and a decoder.

    How images are cut and which of the tower's layers is the feature is taken from the projector's own model, else from
    the decoder's, else from the tower's; parts that have no model around them leave it at the defaults.

    Args:
        vision: where the tower comes from.
        language: where the decoder comes from.
        projector: where the projector and the newline come from; None: they are drawn at random.
        save: the checkpoint folder to make.
        tokenizer: Hugging Face folder or sentencepiece file; by default the decoder's own.

    Returns:
        Names of the tensors that were drawn.

    Raises:
        ConversionError: a source that lacks its part or cannot be read, or parts that do not fit.
    """
    tower, decoder = open_source(vision), open_source(language)
    between = open_source(projector) if projector else None
    if tower.vision is None:
        raise ConversionError(f"{vision} ({tower.kind}) has no vision tower")
    if decoder.language is None:
        raise ConversionError(f"{language} ({decoder.kind}) has no language model")
    chosen = {"vision": tower, "language": decoder} | ({"projector": between} if between else {})
    if between and "projector" not in between.parts:
        raise ConversionError(f"{projector} ({between.kind}) has no projector")
    parts = {part: ChosenTensors(source.tensors, PARTS[part]) for part, source in chosen.items()}
    if between:
        _check_projector(parts["projector"], between, tower.vision, decoder.language)
    with new_folder(save) as making:
        words = import_tokenizer(tokenizer or decoder.tokenizer, making / "tokenizer")
        model, aspect_ratio = _model(tower.vision, _decoder(decoder), (between, decoder, tower), len(words))
        check_image_token(words, model, str(language))
        source = " with ".join(str(source.path) for source in chosen.values())
        tensors = JoinedTensors(*parts.values())
        optional = (NEWLINE,) if between else PARTS["projector"]  # LLaVA's first stage has no newline
        entries = [e for e in name_map(model) if e.hf[0] in tensors or not e.hf[0].startswith(optional)]
        return write_model(making, save, model, entries, tensors, source, words.fingerprint, aspect_ratio)


def _decoder(source: Source) -> LanguageConfig:
    """A decoder alone is to be trained on rows, and knows as long a context as they have then."""
    assert source.language is not None
    if source.model:
        return source.language
    return replace(source.language, max_position_embeddings=DataConfig().seq_length)


def _model(
    vision: VisionConfig, language: LanguageConfig, sources: tuple[Source | None, ...], image_token_index: int
) -> tuple[ModelConfig, str]:
    for source in sources:
        if source and source.model:
            layer = source.model.vision.vision_feature_layer
            tower = replace(vision, vision_feature_layer=layer)
            model = replace(source.model, vision=tower, language=language, image_token_index=image_token_index)
            return model, source.aspect_ratio
    return model_from_parts(vision, language, image_token_index), "anyres"


def _check_projector(tensors: ChosenTensors, source: Source, vision: VisionConfig, language: LanguageConfig) -> None:
    """Say what does not fit in the reader's terms; the name map would only tell of shapes."""
    name = PARTS["projector"][0] + "linear_1.weight"
    if name not in tensors:
        raise ConversionError(f"{source.path} holds no projector: {name} (or mm_projector.0.weight) is not there")
    wanted, found = (language.hidden_size, vision.hidden_size), tensors.shape(name)
    if found != wanted:
        raise ConversionError(
            f"the projector of {source.path} does not fit: its first weight is {found}, but the tower gives "
            f"{wanted[1]} numbers a patch and the decoder takes {wanted[0]}, so that it must be {wanted}. It was "
            "trained between other parts"
        )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_convert.merge", description=DESCRIPTION)
    for part in PARTS:
        parser.add_argument(f"--{part}", type=Path, required=True, help=f"where the {part} part comes from")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder or .model file; default: the language part's")
    parser.add_argument("--save", type=Path, required=True, help="checkpoint folder to make")
    args = parser.parse_args(argv)

    def command() -> None:
        drawn = merge(args.vision, args.language, args.projector, args.save, args.tokenizer)
        tell_made(drawn, args.save)

    return run_command(command)


def tell_made(drawn: list[str], save: Path) -> None:
    """What a conversion says when it is done."""
    if drawn:
        print(f"drawn at random, to be trained: {', '.join(drawn)}")
    print(f"wrote {save}")


if __name__ == "__main__":
    sys.exit(main())
