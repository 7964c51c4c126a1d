"""What a run would start from: whether it is there, whole, and of the recipe's model. No tensor is read."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.huggingface.tokenizer import check_image_token, import_tokenizer
from checkpoint_convert.mapping.lora import WithoutAdapters
from checkpoint_convert.mapping.param_map import HuggingFaceTensors, MegatronTensors, param_map
from checkpoint_convert.megatron.files import imported_recipe
from checkpoint_convert.megatron.reader import CheckpointTensors
from checkpoint_convert.model_source import VLM_FORMATS, open_source
from megatron_vlm.config import Recipe
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.runtime.s3.path import StoragePath, storage_path
from megatron_vlm.training.checkpoint import (
    Progress,
    check_fits,
    choose_checkpoint,
    iteration_of,
    naming,
    require_checkpoint,
    require_same_model,
    require_same_tokenizer,
)


def describe_start(recipe: Recipe) -> str:
    """What a run of this recipe would start from, in words, after checking it as far as its metadata goes.

    Names, shapes and the sizes of files are looked at, of a checkpoint of any layout or a Hugging Face folder.

    Raises:
        CheckpointError: there is no whole checkpoint, or it is of another model or tokenizer.
        ConversionError: a file of it is missing or too short, tensors do not fit the model, or a Hugging Face folder is
            none of a whole VLM.
    """
    training = recipe.training
    found = choose_checkpoint(training.save, training.load)
    if found is not None:
        progress = _check_checkpoint(recipe, found, resume=True)
        return f"resumes after iteration {progress.iteration}, row {progress.consumed_rows}, from {found}"
    if training.pretrained_checkpoint is None:
        return f"random weights, seed {training.seed}"
    source = storage_path(training.pretrained_checkpoint)
    if isinstance(source, Path) and (source / "config.json").is_file():
        return f"the weights of {source} ({_check_folder(recipe, source)}), which is converted first"
    with naming("training.pretrained_checkpoint"):
        checkpoint = require_checkpoint(source)
        _check_checkpoint(recipe, checkpoint, resume=False)
    return f"the weights of {checkpoint}, iteration {iteration_of(checkpoint)}"


def _check_checkpoint(recipe: Recipe, checkpoint: StoragePath, *, resume: bool) -> Progress:
    tensors = CheckpointTensors(checkpoint)  # first, as it names a missing file: megatron-core 0.19's state is in one
    common = check_fits(checkpoint, recipe, load_tokenizer(recipe.data.tokenizer_model).fingerprint, resume=resume)
    entries = param_map(recipe.model)
    HuggingFaceTensors(entries, WithoutAdapters(entries, tensors), str(checkpoint))
    return Progress(**common["progress"])


def _check_folder(recipe: Recipe, folder: Path) -> str:
    """All that conversion would find wrong. Returns the folder's format."""
    source = open_source(folder)
    if source.model is None or source.format not in VLM_FORMATS:
        raise ConversionError(
            f"training.pretrained_checkpoint: {folder} ({source.format}) is not a Hugging Face folder of a whole VLM. "
            "Put its parts together with megatron-vlm import"
        )
    imported_recipe(source.model, source.aspect_ratio, str(folder))
    MegatronTensors(param_map(source.model), source.tensors, str(folder))
    require_same_model(recipe.model, source.model, str(folder))
    with TemporaryDirectory() as copy:
        imported = import_tokenizer(folder, Path(copy, "tokenizer"))
    check_image_token(imported, source.model, str(folder))
    ours = load_tokenizer(recipe.data.tokenizer_model).fingerprint
    require_same_tokenizer(recipe, ours, imported.fingerprint, str(folder))
    return source.format
