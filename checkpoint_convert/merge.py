"""Joins parts of different checkpoints to one model.

python -m checkpoint_convert.merge --vision A --projector B --language C --save DIR

A, B and C are each a Megatron checkpoint or a Hugging Face folder of a whole VLM, of which one part is used; A may be a
vision tower alone, C a language model alone, B a projector alone, as `megatron_to_hf --format projector` writes it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from checkpoint_convert.errors import ConversionError, run_command
from checkpoint_convert.folder import new_folder
from checkpoint_convert.huggingface.config import model_from_parts
from checkpoint_convert.huggingface.peft import read_adapter
from checkpoint_convert.huggingface.tokenizer import check_image_token, import_tokenizer
from checkpoint_convert.mapping.hf_names import PART_PREFIXES
from checkpoint_convert.mapping.lazy_tensors import JoinedTensors, SelectedTensors
from checkpoint_convert.mapping.param_map import PROJECTOR, param_map
from checkpoint_convert.megatron.files import write_model
from checkpoint_convert.model_source import Source, open_source
from megatron_vlm.config import PARTS, DataConfig, LanguageConfig, ModelConfig, VisionConfig

DESCRIPTION = "The vision tower, projector and language model of different checkpoints as one Megatron checkpoint."
NEWLINE = "image_newline"


def merge(
    vision: Path,
    language: Path,
    projector: Path | None,
    save: Path,
    tokenizer: Path | None = None,
    adapter: Path | None = None,
) -> list[str]:
    """Write one checkpoint of a vision tower, a projector and a language model.

    How images are tiled and which layer of the tower gives the features come from the projector's model, else from the
    language model's, else from the tower's. They have their defaults if all three are parts alone.

    Args:
        vision: source of the vision tower.
        language: source of the language model.
        projector: source of the projector and the newline; None: they are randomly initialised.
        save: checkpoint folder to create.
        tokenizer: Hugging Face folder or sentencepiece file; by default the language model's.
        adapter: peft's folder of a LoRA adapter of the language model, which is kept apart from its weights.

    Returns:
        Names of the tensors that were randomly initialised.

    Raises:
        ConversionError: a source lacks its part or cannot be read, or the parts do not fit together.
    """
    vision_source, language_source = open_source(vision), open_source(language)
    projector_source = open_source(projector) if projector else None
    if vision_source.vision is None:
        raise ConversionError(
            f"{vision} ({vision_source.format}) has no vision tower. Give CLIP, SigLIP or a whole VLM"
        )
    if language_source.language is None:
        raise ConversionError(
            f"{language} ({language_source.format}) has no language model. Give OLMo, Llama, Mistral, Qwen2 or a whole "
            "VLM"
        )
    sources = {"vision": vision_source, "language": language_source}
    if projector_source:
        if "projector" not in projector_source.parts:
            raise ConversionError(
                f"{projector} ({projector_source.format}) has no projector. Give mm_projector.bin or a whole VLM"
            )
        sources["projector"] = projector_source
    tensors = {part: SelectedTensors(source.tensors, PART_PREFIXES[part]) for part, source in sources.items()}
    if projector_source:
        _check_projector(tensors["projector"], projector_source, vision_source.vision, language_source.language)
    with new_folder(save) as staging_dir:
        imported = import_tokenizer(tokenizer or language_source.tokenizer, staging_dir / "tokenizer")
        model, aspect_ratio = _merged_model(
            vision_source.vision,
            _with_context(language_source, language_source.language),
            (projector_source, language_source, vision_source),
            len(imported),
        )
        check_image_token(imported, model, str(language))
        joined = JoinedTensors(*tensors.values())
        # LLaVA's first stage trains no newline
        optional = (NEWLINE,) if projector_source else PART_PREFIXES["projector"]
        entries = [e for e in param_map(model) if e.hf[0] in joined or not e.hf[0].startswith(optional)]
        names = " with ".join(str(source.path) for source in sources.values())
        read = read_adapter(adapter, model, str(language)) if adapter else None
        return write_model(staging_dir, save, model, entries, joined, names, imported.fingerprint, aspect_ratio, read)


def _with_context(source: Source, language: LanguageConfig) -> LanguageConfig:
    """A language model alone gets the context that it will be trained with: the default length of a row."""
    return language if source.model else replace(language, max_position_embeddings=DataConfig().seq_length)


def _merged_model(
    vision: VisionConfig, language: LanguageConfig, sources: tuple[Source | None, ...], image_token_index: int
) -> tuple[ModelConfig, str]:
    """The model, and its image_aspect_ratio; what belongs to no part comes from the first source of a whole VLM."""
    for source in sources:
        if source and source.model:
            tower = replace(vision, vision_feature_layer=source.model.vision.vision_feature_layer)
            model = replace(source.model, vision=tower, language=language, image_token_index=image_token_index)
            return model, source.aspect_ratio
    return model_from_parts(vision, language, image_token_index), "anyres"


def _check_projector(tensors: SelectedTensors, source: Source, vision: VisionConfig, language: LanguageConfig) -> None:
    """Raise ConversionError if the projector does not fit; the parameter map would only report shapes."""
    name = PROJECTOR + "linear_1.weight"
    if name not in tensors:
        raise ConversionError(f"{source.path} holds no projector: it has neither {name} nor mm_projector.0.weight")
    expected, found = (language.hidden_size, vision.hidden_size), tensors.shape(name)
    if found != expected:
        raise ConversionError(
            f"the projector of {source.path} does not fit: its first weight is {found} and must be {expected}, "
            f"because the tower's hidden size is {expected[1]} and the language model's {expected[0]}. It was trained "
            "with other parts: give those"
        )


def main(argv: list[str] | None = None, prog: str = "python -m checkpoint_convert.merge") -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog, description=DESCRIPTION)
    for part in PARTS:
        parser.add_argument(f"--{part}", type=Path, required=True, help=f"source of the {part} part")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder or .model file; default: the language part's")
    parser.add_argument("--save", type=Path, required=True, help="checkpoint folder to create")
    args = parser.parse_args(argv)

    def command() -> None:
        initialised = merge(args.vision, args.language, args.projector, args.save, args.tokenizer)
        report_saved(initialised, args.save)

    return run_command(command)


def report_saved(initialised: list[str], save: Path) -> None:
    """Print what a conversion wrote and which tensors have no trained weights yet."""
    if initialised:
        print(f"randomly initialised, to be trained: {', '.join(initialised)}")
    print(f"wrote {save}")


if __name__ == "__main__":
    sys.exit(main())
