"""The command line of training: --config RECIPE.yaml, and a flag for every setting."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from megatron_vlm.config.errors import ConfigError, nearest_key
from megatron_vlm.config.recipe import ABSENT_SETTINGS, OTHER_NAMES, Recipe, Setting, apply, iter_settings, read_yaml
from megatron_vlm.config.values import without_none

_INTRODUCTION = """\
usage: {prog} --config RECIPE.yaml [--SETTING VALUE ...]
       torchrun --nproc-per-node N -m megatron_vlm.train --config RECIPE.yaml [--SETTING VALUE ...]

Train a vision-language model. The command line overrides the recipe, and the recipe overrides the defaults.
Switches can be written --bf16, --bf16 true, --bf16 false or --no-bf16. Lists take several values. `none` unsets one.
Defaults are in [brackets].

  --config RECIPE.yaml   YAML file with the sections below.
  --dry-run              Check all settings and the data, print a summary of the run, and exit.
  --help                 Print this text."""

_HEADINGS = {
    "data": "data: sources, tokenizer, tiling, packing and loading",
    "training": "training: optimization, logging and checkpoints",
    "parallel": "parallel: the parallel layout; the data-parallel size follows from the number of processes",
    "model": "model: the model as a whole",
    "model.vision": "model.vision: the vision tower",
    "model.language": "model.language: the language model",
}

_FLAG_COLUMN = 43

_METAVARS = {int: "N", float: "X", str: "TEXT", list[str]: "TEXT ...", list[int]: "N ...", list[list[int]]: "WxH ..."}

Complete = Callable[[Recipe, set[str]], None]
"""Fills in, in place, settings of a recipe that are not among the given keys."""


def keep_given(recipe: Recipe, given: set[str]) -> None:
    """Fill in nothing: every setting that was not given keeps its default."""


def parse_command_line(
    argv: Sequence[str] | None = None, prog: str = "megatron-vlm train"
) -> tuple[Recipe, argparse.Namespace]:
    """The recipe that `argv` describes (without the program's name; default: sys.argv).

    `prog` is the program's name in the help text.

    The namespace holds the options that are not settings: `config` (path or None), `dry_run`, and `given`: the dotted
    keys of the settings that the recipe or the command line sets. Raises ConfigError with all unknown flags, unknown
    keys and wrong values; `--help` prints the help and exits.
    """
    recipe = Recipe()
    settings = list(iter_settings(recipe))
    parsed, unknown = _parser(settings, prog).parse_known_args(sys.argv[1:] if argv is None else argv)
    options = argparse.Namespace(config=parsed.config, dry_run=parsed.dry_run)

    problems = _unknown_arguments(unknown, settings)
    options.given = {setting.key for setting in settings if hasattr(parsed, setting.key)}
    if options.config is not None:
        values = read_yaml(options.config)
        options.given |= set(_dotted_keys(values))
        problems += apply(recipe, values, lambda key: f"{options.config}: {key}")
    tree: dict[str, Any] = {}
    for setting in settings:
        if hasattr(parsed, setting.key):
            *parents, name = setting.key.split(".")
            branch = tree
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[name] = _as_yaml(getattr(parsed, setting.key), setting)
    problems += apply(recipe, tree, flag)
    if problems:
        raise ConfigError(problems)
    return recipe, options


def _dotted_keys(values: Any, prefix: str = "") -> Iterator[str]:
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            yield from _dotted_keys(value, f"{prefix}{name}.")
        elif value is not None or prefix:
            yield f"{prefix}{name}"


def flag(key: str) -> str:
    """The flag of a setting: its own name as in Megatron-LM, or for the model its dotted name."""
    if not key.startswith("model."):
        key = key.rpartition(".")[2]
    return "--" + key.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    """An argument parser that prints one line per setting and raises ConfigError."""

    def __init__(self, settings: list[Setting], prog: str) -> None:
        super().__init__(prog, allow_abbrev=False)
        self.settings = settings

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. All flags: megatron-vlm train --help")

    def format_help(self) -> str:
        return help_text(self.settings, self.prog)


def _parser(settings: list[Setting], prog: str) -> _Parser:
    parser = _Parser(settings, prog)
    parser.add_argument("--config")
    parser.add_argument("--dry-run", action="store_true")
    for setting in settings:
        options: dict[str, Any] = {"dest": setting.key, "default": argparse.SUPPRESS}
        if without_none(setting.hint)[0] is bool:
            parser.add_argument(flag(setting.key), nargs="?", const="true", **options)
            parser.add_argument(_negative(setting.key), action="store_const", const="false", **options)
        elif setting.is_list:
            parser.add_argument(flag(setting.key), nargs="+", **options)
        else:
            parser.add_argument(flag(setting.key), **options)
    return parser


def _negative(key: str) -> str:
    """--no-bf16 and --model.language.no-tie-word-embeddings."""
    parents, dot, name = flag(key)[2:].rpartition(".")
    return f"--{parents}{dot}no-{name}"


def _as_yaml(text: Any, setting: Setting) -> Any:
    """The arguments of a flag, as a YAML file would give them."""
    if setting.hint == list[list[int]]:
        if text[0].startswith("("):
            return "".join(text)
        return [re.split("[x,]", item) for item in text]
    is_none = text in (["none"], ["null"]) if setting.is_list else text.lower() in ("none", "null")
    if without_none(setting.hint)[1] and is_none:
        return None
    return text


def _unknown_arguments(arguments: list[str], settings: list[Setting]) -> list[str]:
    keys = ["config", "dry_run", *(setting.key for setting in settings)]
    problems = []
    for argument in arguments:
        if not argument.startswith("-"):
            continue
        name = argument.partition("=")[0]
        plain = name.lstrip("-").replace("-", "_")
        guess = OTHER_NAMES.get(plain) or nearest_key(plain, keys)
        if plain in ABSENT_SETTINGS:
            remedy = f"About {plain}: {ABSENT_SETTINGS[plain]}."
        elif guess:
            remedy = f"Did you mean {flag(guess)}?"
        else:
            remedy = "All flags: megatron-vlm train --help"
        problems.append(f"{name}: there is no such flag. {remedy}")
    if arguments and not problems:
        problems.append(f"{arguments[0]}: a value without a flag. Write --SETTING VALUE.")
    return problems


def help_text(settings: list[Setting], prog: str) -> str:
    """The help text: one line per setting, grouped by section."""
    columns = [_invocation(setting) for setting in settings]
    # A few flags with many choices exceed the column, so that it stays narrow for the others.
    width = min(max(map(len, columns)), _FLAG_COLUMN)
    lines = [_INTRODUCTION.format(prog=prog)]
    for section, heading in _HEADINGS.items():
        lines += ["", heading]
        for setting, invocation in zip(settings, columns, strict=True):
            if setting.key.rpartition(".")[0] == section:
                lines.append(f"  {invocation:<{width}}  {setting.help}{_default(setting)}")
    return "\n".join(lines) + "\n"


def _invocation(setting: Setting) -> str:
    if without_none(setting.hint)[0] is bool:
        parents, dot, name = flag(setting.key)[2:].rpartition(".")
        return f"--{parents}{dot}[no-]{name}"
    if setting.choices:
        several = " ..." if setting.is_list else ""
        return f"{flag(setting.key)} {{{','.join(setting.choices)}}}{several}"
    inner, _ = without_none(setting.hint)
    return f"{flag(setting.key)} {_METAVARS[inner]}"


def _default(setting: Setting) -> str:
    default = setting.value
    if default is None:
        return "" if "default:" in setting.help else " [none]"
    if default in ("", []):
        return " [required]"
    if setting.hint == list[list[int]]:
        return f" [{len(default)} from {'x'.join(map(str, default[0]))} to {'x'.join(map(str, default[-1]))}]"
    if isinstance(default, list):
        return f" [{' '.join(default)}]"
    if isinstance(default, bool):
        return f" [{str(default).lower()}]"
    return f" [{default}]"
