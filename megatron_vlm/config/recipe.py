"""A recipe: everything one run is made of, read from YAML with every key and type checked."""

from __future__ import annotations

import dataclasses
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
from megatron_vlm.config.values import field_types, to_type

# Names that people who know Megatron-LM look for, and what stands in their place here.
REPLACED = {
    "sequence_parallel": "it is always on when tensor_model_parallel_size > 1; leave it out",
    "micro_batch_size": "a micro-batch is always one packed row; set global_batch_size in rows",
    "data_parallel_size": "it is the world size divided by the model-parallel sizes; leave it out",
}


@dataclass
class Recipe:
    """The four sections of a recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True)
class Setting:
    """One setting: its key (`training.lr`), its type, its default and what the field says about itself."""

    key: str
    kind: Any
    default: Any
    help: str
    choices: tuple[str, ...]


def leaves(section: Any, prefix: str = "") -> Iterator[Setting]:
    """All settings of a dataclass instance and of those inside it, in the order they are declared."""
    kinds = field_types(type(section))
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            about = item.metadata
            key = prefix + item.name
            yield Setting(key, kinds[item.name], value, about.get("help", ""), tuple(about.get("choices", ())))


def load_recipe(path: str | Path | None, overrides: dict[str, Any] | None = None) -> Recipe:
    """The defaults, changed by the YAML file, changed by `overrides` (a dict of the same shape as the file).

    Relative paths inside the file are relative to the working directory. Raises ConfigError with every unknown key and
    every wrong type.
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
    """Plain dicts, lists, numbers and text, fit for JSON and YAML."""
    return dataclasses.asdict(recipe)


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe `recipe_to_dict` was given. Settings that are missing keep their defaults; unknown ones are errors."""
    return load_recipe(None, values)


def apply(section: Any, values: Any, describe: Callable[[str], str], prefix: str = "") -> list[str]:
    """Write a tree of values into a section, in place, and return what was wrong with it.

    `describe` turns a key into how the user wrote it, file included.
    """
    if values is None:  # a section whose settings are all commented out
        return []
    if not isinstance(values, dict):
        where = describe(prefix.rstrip(".") or "the whole file")
        return [f"{where}: expected settings, one `name: value` a line, got {values!r}."]
    problems = []
    kinds = field_types(type(section))
    # A range of pinpoints counts tiles, whose size is another setting: that one first.
    for name, value in sorted(values.items(), key=lambda item: item[0] == "image_grid_pinpoints"):
        key = f"{prefix}{name}"
        if name not in kinds:
            problems.append(f"{describe(key)}: there is no such setting. {right_name(key)}")
        elif dataclasses.is_dataclass(kinds[name]):
            problems += apply(getattr(section, name), value, describe, f"{key}.")
        else:
            try:
                if name == "image_grid_pinpoints" and isinstance(value, str):
                    value = expand_pinpoints(value, section.vision.image_size)
                setattr(section, name, to_type(value, kinds[name]))
            except ValueError as wrong:
                problems.append(f"{describe(key)}: {wrong}.")
    return problems


def right_name(key: str) -> str:
    """What to write instead of a key that does not exist, as a sentence."""
    name = key.rpartition(".")[2]
    if name in REPLACED:
        return f"About {name}: {REPLACED[name]}."
    keys = [leaf.key for leaf in leaves(Recipe())]
    keys += sorted({parent for known in keys if (parent := known.rpartition(".")[0])})
    guess = nearest_key(key, keys)
    return f"Did you mean {guess}?" if guess else "All settings: python -m megatron_vlm.train --help"


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would quietly take the last."""

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
    """What the file holds. Raises ConfigError where it cannot be read or is no YAML."""
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: the recipe cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
