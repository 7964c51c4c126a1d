"""Write a recipe with comments, from data and a model.

megatron-vlm init --data train.jsonl --image-folder images --model MODEL_DIR --output my-run
megatron-vlm init --data shards --vision-model CLIP_DIR --language-model OLMO_DIR --output my-run
megatron-vlm init --data train.jsonl --image-folder images --from-scratch tiny --output my-run

The lengths of all samples are measured. Row length, batch size and epochs follow from them, the rest from the model.
Each recipe is checked as `plan` does before it is kept: nothing is written that does not train.

--model                            OUTPUT/recipe.yaml trains all parts of a whole model further
--vision-model, --language-model   joins them to the checkpoint OUTPUT/start, with a new projector, and writes two
                                   recipes: OUTPUT/projector.yaml, then OUTPUT/instruct.yaml
--from-scratch                     a small model with random weights, and a tokenizer trained on the data's texts, to
                                   try the whole way; it learns narrow tasks
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_vlm.config import PARTS, ConfigError, Recipe, check_recipe, load_recipe
from megatron_vlm.data.errors import DataError, SampleError
from megatron_vlm.new_recipe.choices import Lengths, choose
from megatron_vlm.new_recipe.sizes import SIZES, model_of, write_tokenizer
from megatron_vlm.new_recipe.text import Data, Stage, recipe_text
from megatron_vlm.runtime.atomic_files import is_absent_or_empty

_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_VALID_SHARES = ((2000, 0.02), (100, 0.1))
"""(usable samples at least, share that is held out)"""
_PROJECTOR_LR, _LANGUAGE_LR, _VISION_LR = 1e-3, 2e-5, 2e-6
"""LLaVA's, and a tenth for the vision tower, as LLaVA-NeXT's."""


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data = parser.add_argument_group("data, as in a recipe")
    data.add_argument("--data", nargs="+", required=True, metavar="PATH", help="annotations, shards or a mixture file")
    data.add_argument("--image-folder", metavar="DIR", help="folder that image paths in annotations start from")
    data.add_argument("--data-root", metavar="DIR", help="folder that paths in a mixture file start from")
    data.add_argument("--cache-dir", metavar="DIR", help="folder for lengths and downloaded shards")
    data.add_argument("--valid-data", nargs="+", default=[], metavar="PATH", help="default: a share of --data, if many")
    model = parser.add_argument_group("model: one of these")
    model.add_argument("--model", type=Path, metavar="DIR", help="a whole VLM: a Hugging Face folder or a checkpoint")
    model.add_argument("--vision-model", type=Path, metavar="DIR", help="with --language-model: CLIP or SigLIP")
    model.add_argument("--language-model", type=Path, metavar="DIR", help="OLMo, Llama, Mistral or Qwen2")
    model.add_argument("--from-scratch", choices=SIZES, help="a small model with random weights")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the data; default: from their number")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to create")
    return parser


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code: 0; 2 if the data, the model or an argument is wrong: nothing is written then."""
    parser = _parser(prog)
    options = parser.parse_args(argv)
    parts = (options.vision_model, options.language_model)
    if sum((options.model is not None, any(parts), options.from_scratch is not None)) != 1 or any(parts) != all(parts):
        parser.error("give one of --model, --vision-model with --language-model, and --from-scratch")
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--epochs {options.epochs}: give at least 1")
    # torch and megatron-core are imported from here on only: --help is answered at once.
    from checkpoint_convert.errors import ConversionError
    from megatron_vlm.runtime.logging import configure_logging

    configure_logging("init")
    try:
        _check_data_paths(options.data, options.valid_data)
        with _new_folder(options.output):
            _write(options)
    except (ConfigError, DataError, ConversionError) as error:
        print(f"error: {error}\nNothing was written.", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or options.output}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def _check_data_paths(data: Sequence[str], valid: Sequence[str]) -> None:
    for flag, paths in (("--data", data), ("--valid-data", valid)):
        for path in paths:
            if path.endswith(_TABLES) and Path(path).is_file():
                example = f"megatron-vlm convert-dataset qa --input {path} --output train.jsonl --image-folder DIR"
                raise DataError(f"{flag} {path} is a table. Convert it first, for example: {example}")


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Create a folder, and remove it if the block raises."""
    if not is_absent_or_empty(folder):
        raise DataError(f"--output {folder} already exists and is not empty; give another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(options: argparse.Namespace) -> None:
    recipe, start = _data_and_model(options)
    from megatron_vlm.data.dataset import open_sources
    from megatron_vlm.data.length_index import REJECTED

    indexes = open_sources(recipe).load_indexes(recipe.data)
    tokens = [index.tokens[index.tokens != REJECTED] for index in indexes]
    tiles = [index.tiles[index.tokens != REJECTED] for index in indexes]
    if not sum(map(len, tokens)):
        raise DataError(_no_samples(options.data, [r.message for index in indexes for r in index.rejected]))
    import numpy as np

    lengths = Lengths.of(np.concatenate(tokens), np.concatenate(tiles))
    model, context = recipe.model, recipe.model.language.max_position_embeddings
    if options.from_scratch:
        model = model_of(SIZES[options.from_scratch], recipe.model.image_token_index, lengths.longest)
    share = (
        0.0 if options.valid_data else next((share for least, share in _VALID_SHARES if lengths.samples >= least), 0)
    )
    data = Data(
        options.data, options.image_folder, options.data_root, options.cache_dir, options.valid_data, share,
        recipe.data.tokenizer_model, recipe.data.image_aspect_ratio,
    )  # fmt: skip
    for stage in _stages(options, start):
        passes = 1 if stage.trainable == ("projector",) else options.epochs
        choices = choose(
            lengths, None if options.from_scratch else context, from_scratch=bool(options.from_scratch), passes=passes
        )
        if options.from_scratch:  # validation samples may be longer
            model.language.max_position_embeddings = choices.seq_length
        Path(stage.file).write_text(recipe_text(stage, data, model, lengths, choices), encoding="utf-8")
        print(f"\n{stage.file}: {stage.title}\n{_checked(stage, start)}")
    print(f"\nNext: megatron-vlm plan --config {_stages(options, start)[0].file}")


def _no_samples(paths: Sequence[str], messages: list[str]) -> str:
    example = f" The first: {messages[0]}" if messages else ""
    return f"none of {len(messages)} samples of {', '.join(paths)} is usable.{example}"


def _data_and_model(options: argparse.Namespace) -> tuple[Recipe, str | None]:
    """A recipe that is complete enough to measure lengths, and the initial weights; tokenizer and start are written."""
    recipe, start = Recipe(), None
    data = recipe.data
    data.data_path, data.image_folder = options.data, options.image_folder
    data.data_root, data.cache_dir = options.data_root, options.cache_dir
    if options.from_scratch:
        size, folder = SIZES[options.from_scratch], options.output / "tokenizer"
        vocab_size = write_tokenizer(_texts(recipe), size.max_vocab_size, folder)
        recipe.model = model_of(size, vocab_size, data.seq_length)
        data.tokenizer_model = str(folder)  # images as anyres: llava_next, the format of exports, knows nothing else
        return recipe, None
    from checkpoint_convert.errors import ConversionError
    from checkpoint_convert.merge import merge
    from checkpoint_convert.model_config import complete_recipe
    from checkpoint_convert.model_source import open_source

    if options.model is None:
        start = options.output / "start"
        merge(options.vision_model, options.language_model, None, start)
    else:
        start = options.model
    source = open_source(start)
    if source.model is None:
        raise ConversionError(
            f"--model {start} ({source.format}) has only {', '.join(source.parts)}. Give a whole model, or two folders "
            "as --vision-model and --language-model"
        )
    recipe.training.pretrained_checkpoint = str(start)
    data.image_aspect_ratio = source.aspect_ratio
    complete_recipe(recipe, {"data.image_aspect_ratio"})
    return recipe, str(start)


def _texts(recipe: Recipe) -> Iterator[str]:
    """The texts of all samples that can be read."""
    from megatron_vlm.data.sources.mixture import open_mixture

    data = recipe.data
    for source in open_mixture(data.data_path, data.image_folder, data.data_root, data.cache_dir).sources.sources:
        for index in range(len(source)):
            try:
                yield from (turn.text.replace("<image>", "") for turn in source.metadata(index).turns)
            except SampleError:  # measuring reports it
                continue


def _stages(options: argparse.Namespace, start: str | None) -> list[Stage]:
    """The recipes to write, in the order in which they are run."""
    folder = options.output
    if options.from_scratch:
        title = f"A {options.from_scratch} model from random weights; all parts are trained."
        lr = SIZES[options.from_scratch].lr
        return [Stage(title, str(folder / "recipe.yaml"), PARTS, lr, None, 0.98, False, None, "", str(folder / "run"))]
    everything = Stage(
        "All parts of the model, trained further.", str(folder / "recipe.yaml"), PARTS, _LANGUAGE_LR, _VISION_LR, 0.999,
        True, start, "the initial weights", str(folder / "run"),
    )  # fmt: skip
    if options.model is not None:
        return [everything]
    projector = Stage(
        "Stage 1 of 2: the new projector, on frozen vision tower and language model.", str(folder / "projector.yaml"),
        ("projector",), _PROJECTOR_LR, None, 0.999, True, start, "tower and language model, and a random projector",
        str(folder / "projector"),
    )  # fmt: skip
    instruct = replace(
        everything,
        title="Stage 2 of 2: all parts. Run stage 1 first.",
        file=str(folder / "instruct.yaml"),
        start=projector.save,
        start_comment="what stage 1 saved",
        save=str(folder / "instruct"),
    )
    return [projector, instruct]


def _checked(stage: Stage, start: str | None) -> str:
    """What `plan` prints of the recipe that was written. Raises ConfigError or DataError if it cannot train."""
    from megatron_vlm.training.dry_run import describe_run

    recipe = load_recipe(stage.file)
    recipe.training.pretrained_checkpoint = start  # that of stage 2 is not there yet, and is the same model
    check_recipe(recipe, world_size=1, paths=True)
    return describe_run(recipe, world_size=1)
