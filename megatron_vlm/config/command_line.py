"""The command line: a recipe by name, and a flag for every setting of it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_vlm.config.errors import ConfigError, nearest_key
from megatron_vlm.config.recipe import REPLACED, Recipe, Setting, apply, leaves, read_yaml
from megatron_vlm.config.values import without_none

_INTRODUCTION = """\
usage: python -m megatron_vlm.train --config RECIPE.yaml [--SETTING VALUE ...]

Train a vision-language model. A setting on the command line beats the recipe, the recipe beats the default.
Switches: --bf16, --bf16 true, --bf16 false and --no-bf16 all work. Lists take several values. `none` unsets.
Defaults stand in [brackets].

  --config RECIPE.yaml   the recipe; its sections are those below
  --dry-run              check everything, print the plan and stop before training
  --help                 this text"""

_HEADINGS = {
    "data": "data: what is read and how it becomes rows",
    "training": "training: how it is trained, logged and saved",
    "parallel": "parallel: how the model is laid out over processes",
    "model": "model: what the model is",
    "model.vision": "model.vision: the vision tower",
    "model.language": "model.language: the language model",
}

_FLAG_COLUMN = 43

_METAVARS = {int: "N", float: "X", str: "TEXT", list[str]: "TEXT ...", list[list[int]]: "WxH ..."}


def parse_command_line(argv: Sequence[str] | None = None) -> tuple[Recipe, argparse.Namespace]:
    """The recipe that `argv` (without the program's name; default: this process's own) asks for.

    The namespace holds what is not a setting: `config` (path or None) and `dry_run`. Raises ConfigError with every
    unknown flag, unknown key and wrong value together; `--help` prints and exits.
    """
    recipe = Recipe()
    settings = list(leaves(recipe))
    parsed, unknown = _parser(settings).parse_known_args(sys.argv[1:] if argv is None else argv)
    options = argparse.Namespace(config=parsed.config, dry_run=parsed.dry_run)

    problems = _unknown_arguments(unknown, settings)
    if options.config is not None:
        problems += apply(recipe, read_yaml(options.config), lambda key: f"{options.config}: {key}")
    tree: dict[str, Any] = {}
    for leaf in settings:
        if hasattr(parsed, leaf.key):
            *parents, name = leaf.key.split(".")
            branch = tree
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[name] = _as_yaml(getattr(parsed, leaf.key), leaf)
    problems += apply(recipe, tree, flag)
    if problems:
        raise ConfigError(problems)
    return recipe, options


def flag(key: str) -> str:
    """The flag of a setting: Megatron-LM's name, or the dotted name for what belongs to the model."""
    if not key.startswith("model."):
        key = key.rpartition(".")[2]
    return "--" + key.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    """argparse with our help and our error."""

    def __init__(self, settings: list[Setting]) -> None:
        super().__init__(allow_abbrev=False)
        self.settings = settings

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. All flags: python -m megatron_vlm.train --help")

    def format_help(self) -> str:
        return help_text(self.settings)


def _parser(settings: list[Setting]) -> _Parser:
    parser = _Parser(settings)
    parser.add_argument("--config")
    parser.add_argument("--dry-run", action="store_true")
    for leaf in settings:
        options: dict[str, Any] = {"dest": leaf.key, "default": argparse.SUPPRESS}
        if leaf.kind is bool:
            parser.add_argument(flag(leaf.key), nargs="?", const="true", **options)
            parser.add_argument(_negative(leaf.key), action="store_const", const="false", **options)
        elif isinstance(leaf.default, list):
            parser.add_argument(flag(leaf.key), nargs="+", **options)
        else:
            parser.add_argument(flag(leaf.key), **options)
    return parser


def _negative(key: str) -> str:
    """--no-bf16 and --model.language.no-tie-word-embeddings."""
    parents, dot, name = flag(key)[2:].rpartition(".")
    return f"--{parents}{dot}no-{name}"


def _as_yaml(text: Any, leaf: Setting) -> Any:
    """What a YAML file would have given for the words behind a flag."""
    if leaf.kind == list[list[int]]:
        if text[0].startswith("("):
            return "".join(text)
        return [re.split("[x,]", item) for item in text]
    if without_none(leaf.kind)[1] and text.lower() in ("none", "null"):
        return None
    return text


def _unknown_arguments(arguments: list[str], settings: list[Setting]) -> list[str]:
    keys = ["config", "dry_run", *(leaf.key for leaf in settings)]
    problems = []
    for argument in arguments:
        if not argument.startswith("-"):
            continue
        name = argument.partition("=")[0]
        plain = name.lstrip("-").replace("-", "_")
        guess = nearest_key(plain, keys)
        if plain in REPLACED:
            remedy = f"About {plain}: {REPLACED[plain]}."
        elif guess:
            remedy = f"Did you mean {flag(guess)}?"
        else:
            remedy = "All flags: python -m megatron_vlm.train --help"
        problems.append(f"{name}: there is no such flag. {remedy}")
    if arguments and not problems:
        problems.append(f"{arguments[0]}: a value without a flag. Write --SETTING VALUE.")
    return problems


def help_text(settings: list[Setting]) -> str:
    """One line for each setting, under its section."""
    columns = [_invocation(leaf) for leaf in settings]
    # a few flags with long choices do not push everything else to the right
    width = min(max(map(len, columns)), _FLAG_COLUMN)
    lines = [_INTRODUCTION]
    for section, heading in _HEADINGS.items():
        lines += ["", heading]
        for leaf, invocation in zip(settings, columns, strict=True):
            if leaf.key.rpartition(".")[0] == section:
                lines.append(f"  {invocation:<{width}}  {leaf.help}{_default(leaf)}")
    return "\n".join(lines) + "\n"


def _invocation(leaf: Setting) -> str:
    if leaf.kind is bool:
        parents, dot, name = flag(leaf.key)[2:].rpartition(".")
        return f"--{parents}{dot}[no-]{name}"
    if leaf.choices:
        several = " ..." if isinstance(leaf.default, list) else ""
        return f"{flag(leaf.key)} {{{','.join(leaf.choices)}}}{several}"
    inner, _ = without_none(leaf.kind)
    return f"{flag(leaf.key)} {_METAVARS[inner]}"


def _default(leaf: Setting) -> str:
    default = leaf.default
    if default is None:
        return "" if "default:" in leaf.help else " [none]"
    if default in ("", []):
        return " [required]"
    if leaf.kind == list[list[int]]:
        return f" [{len(default)} from {'x'.join(map(str, default[0]))} to {'x'.join(map(str, default[-1]))}]"
    if isinstance(default, list):
        return f" [{' '.join(default)}]"
    if isinstance(default, bool):
        return f" [{str(default).lower()}]"
    return f" [{default}]"
