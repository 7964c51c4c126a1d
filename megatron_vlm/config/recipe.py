"""A recipe: all settings of a run, read from YAML with every key and type checked."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_vlm.config.data import DataConfig
from megatron_vlm.config.errors import ConfigError, nearest_key
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.config.parallel import ParallelConfig
from megatron_vlm.config.pinpoints import expand_pinpoints
from megatron_vlm.config.training import TrainingConfig
from megatron_vlm.config.values import choices_of, field_types, to_type, without_none

_STAGES = "give the layers of all stages as pipeline_model_parallel_layout, such as Et*3|t*4|t*4|t*5L, or use auto"
ABSENT_SETTINGS = {
    "sequence_parallel": "it is always on when tensor_model_parallel_size > 1; leave it out",
    "micro_batch_size": "a micro-batch is always one packed row; set global_batch_size in rows",
    "lora_dropout": "its masks would differ between parallel layouts, which must train alike; leave it out",
    "lora_bias": "only A and B are trained; leave it out",
    "data_parallel_size": "it is the world size divided by the model-parallel sizes; leave it out",
    "num_layers_in_first_pipeline_stage": _STAGES,
    "num_layers_in_last_pipeline_stage": _STAGES,
    "decoder_first_pipeline_num_layers": _STAGES,
    "decoder_last_pipeline_num_layers": _STAGES,
}
"""Settings of Megatron-LM and LLaVA that do not exist here, and why."""
OTHER_NAMES = {
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "per_device_train_batch_size": "global_batch_size",
    "per_device_batch_size": "global_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "learning_rate": "lr",
    "warmup_ratio": "lr_warmup_fraction",
    "max_steps": "train_iters",
    "steps": "train_iters",
    "num_train_epochs": "train_iters",
    "epochs": "train_iters",
    "max_length": "seq_length",
    "max_seq_length": "seq_length",
    "model_max_length": "seq_length",
    "output": "save",
    "output_dir": "save",
    "save_steps": "save_interval",
    "logging_steps": "log_interval",
    "model_name_or_path": "pretrained_checkpoint",
    "tokenizer": "tokenizer_model",
    "lora_enable": "trainable",
    "lora_rank": "lora_r",
    "lora_dim": "lora_r",
    "target_modules": "lora_target_modules",
    "annotations": "data_path",
    "image_dir": "image_folder",
    "images": "image_folder",
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "max_grad_norm": "clip_grad",
    "dataloader_num_workers": "num_workers",
}
"""Names that other trainers give to settings of ours whose names are not similar."""
RENAMED_VALUES = {"data.oversized_samples": {"refuse": "error", "cut": "truncate"}}
"""Setting -> old value -> new value. Old values are accepted for one release, with a warning."""


@dataclass
class Recipe:
    """The four sections of a recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe: its dotted key (`training.lr`), type hint, value and help text."""

    key: str
    hint: Any
    value: Any
    help: str

    @property
    def choices(self) -> tuple[str, ...]:
        """Allowed values; () where the type does not list them."""
        return choices_of(self.hint)

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return typing.get_origin(without_none(self.hint)[0]) is list


def iter_settings(section: Any, prefix: str = "") -> Iterator[Setting]:
    """All settings of a section and of the sections inside it, in the order of declaration."""
    hints = field_types(type(section))
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from iter_settings(value, f"{prefix}{item.name}.")
        else:
            yield Setting(prefix + item.name, hints[item.name], value, item.metadata["help"])


def load_recipe(path: str | Path | None, overrides: dict[str, Any] | None = None) -> Recipe:
    """The defaults, overridden by the YAML file, overridden by `overrides` (a dict with the file's structure).

    Relative paths in the file start from the working directory. Raises ConfigError with all unknown keys and wrong
    values.
    """
    recipe = Recipe()
    problems = []
    if path is not None:
        problems += apply(recipe, read_yaml(path), lambda key: f"{path}: {key}")
    problems += apply(recipe, overrides or {}, lambda key: key)
    if problems:
        raise ConfigError(problems)
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Dicts, lists, numbers and text that JSON and YAML can store."""
    return dataclasses.asdict(recipe)


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The inverse of `recipe_to_dict`. Missing settings get their defaults; unknown settings are a ConfigError.

    Old values are read without a warning: a user cannot change what a checkpoint stores.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return load_recipe(None, values)


def apply(section: Any, values: Any, describe: Callable[[str], str], prefix: str = "") -> list[str]:
    """Set a section's settings from nested dicts, in place. Returns the problems found.

    Args:
        section: a Recipe or one of its sections.
        values: setting -> value, or section -> dict.
        describe: turns a dotted key into what the user wrote (file and key, or flag).
        prefix: of the section's keys, such as `model.vision.`.
    """
    if values is None:  # all settings of the section are commented out
        return []
    if not isinstance(values, dict):
        where = describe(prefix.rstrip(".") or "the whole file")
        return [f"{where}: expected settings, one `name: value` a line, got {values!r}."]
    problems = []
    hints = field_types(type(section))
    # A range of pinpoints needs model.vision.image_size, which must be set before.
    for name, value in sorted(values.items(), key=lambda item: item[0] == "image_grid_pinpoints"):
        key = f"{prefix}{name}"
        if name not in hints:
            problems.append(f"{describe(key)}: there is no such setting. {_right_name(key)}")
        elif dataclasses.is_dataclass(hints[name]):
            problems += apply(getattr(section, name), value, describe, f"{key}.")
        else:
            try:
                if name == "image_grid_pinpoints" and isinstance(value, str):
                    value = expand_pinpoints(value, section.vision.image_size)
                setattr(section, name, to_type(_new_value(key, value, describe), hints[name]))
            except ValueError as wrong:
                problems.append(f"{describe(key)}: {wrong}.")
    return problems


def _new_value(key: str, value: Any, describe: Callable[[str], str]) -> Any:
    """The new name of a value of RENAMED_VALUES, with a warning; any other value unchanged."""
    new = RENAMED_VALUES.get(key, {}).get(value) if isinstance(value, str) else None
    if new is None:
        return value
    message = f"{describe(key)}: {value!r} was renamed to {new!r} and will be an error in the next release"
    warnings.warn(message, FutureWarning, stacklevel=2)
    return new


def _right_name(key: str) -> str:
    """A sentence that helps a user who wrote a key that does not exist."""
    name = key.rpartition(".")[2]
    if name in ABSENT_SETTINGS:
        return f"About {name}: {ABSENT_SETTINGS[name]}."
    keys = [setting.key for setting in iter_settings(Recipe())]
    name = OTHER_NAMES.get(name, "")
    for known in keys:
        if known.rpartition(".")[2] == name:
            return f"Did you mean {known}?"
    keys += sorted({parent for known in keys if (parent := known.rpartition(".")[0])})
    guess = nearest_key(key, keys)
    return f"Did you mean {guess}?" if guess else "All settings: megatron-vlm train --help"


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that rejects duplicate keys; PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file. Raises ConfigError if it cannot be read or is not valid YAML."""
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: the recipe cannot be read ({error.strerror}). Check --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}. Correct it.") from error
