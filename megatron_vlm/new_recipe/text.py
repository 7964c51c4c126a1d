"""A recipe as YAML with comments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_vlm.config import ModelConfig
from megatron_vlm.config.recipe import iter_settings
from megatron_vlm.config.training import Part
from megatron_vlm.new_recipe.choices import Choices, Lengths

_COMMENT_COLUMN = 40
_CHECKPOINTS = 5
"""Of a run, the last one included."""


@dataclass(frozen=True)
class Data:
    """The data of a recipe, as the user named it."""

    paths: Sequence[str]
    image_folder: str | None
    data_root: str | None
    cache_dir: str | None
    valid_paths: Sequence[str]
    valid_share: float
    tokenizer: str
    aspect_ratio: str


@dataclass(frozen=True)
class Stage:
    """One recipe of a training that may have several."""

    title: str
    file: str
    """Of the recipe."""
    trainable: tuple[Part, ...]
    lr: float
    vision_lr: float | None
    adam_beta2: float
    bf16: bool
    start: str | None
    """pretrained_checkpoint"""
    start_comment: str
    save: str


def recipe_text(stage: Stage, data: Data, model: ModelConfig, lengths: Lengths, choices: Choices) -> str:
    """The recipe of a stage. `model` is written where it differs from the defaults."""
    interval = max(1, choices.steps // _CHECKPOINTS)
    per_row = lengths.samples * choices.epochs / choices.steps / choices.global_batch_size
    measured = f"samples have {lengths.mean:.0f} tokens on average, {lengths.longest:,} at most"
    lines = [
        f"# {stage.title}",
        "#",
        "# What it would do:  megatron-vlm plan --config " + stage.file,
        "# Train:             megatron-vlm train --config " + stage.file,
        "# On 8 GPUs:         torchrun --nproc-per-node 8 -m megatron_vlm.train --config " + stage.file,
        "#                    with a global_batch_size that 8 divides",
        "# Every setting is also a flag: --lr 1e-4. All settings: megatron-vlm train --help",
        "# Paths are relative to the folder in which the command runs.",
        "data:",
        _line("data_path", list(data.paths), f"{lengths.samples:,} usable samples"),
    ]
    for name in ("image_folder", "data_root", "cache_dir"):
        if getattr(data, name) is not None:
            lines.append(_line(name, getattr(data, name)))
    if data.valid_paths:
        lines.append(_line("valid_data_path", list(data.valid_paths), "eval_loss is measured on these"))
    elif data.valid_share:
        lines.append(_line("valid_share", data.valid_share, "held out of training, for eval_loss"))
    lines += [
        _line("tokenizer_model", data.tokenizer),
        _line("image_aspect_ratio", data.aspect_ratio, _ASPECT_RATIOS.get(data.aspect_ratio, "")),
        _line("seq_length", choices.seq_length, f"tokens of a packed row; {measured}"),
        _line("max_tiles_per_row", choices.max_tiles_per_row, f"a sample has {lengths.tiles:.1f} tiles on average"),
    ]
    if choices.oversized:
        lines.append(_line("oversized_samples", "truncate", "after the last answer that fits; or skip, or error"))
    lines += [
        "training:",
        _line("trainable", list(stage.trainable), "vision, projector, language; the others are frozen"),
        _line("epochs", choices.epochs, f"passes over the data, about {choices.steps:,} steps"),
        _line("global_batch_size", choices.global_batch_size, f"rows of a step, of about {per_row:.0f} samples each"),
        _line("lr", stage.lr, "peak; cosine decay to 0"),
    ]
    if stage.vision_lr is not None:
        lines.append(_line("vision_lr", stage.vision_lr, "of the vision tower"))
    lines.append(_line("lr_warmup_fraction", 0.03))
    if stage.adam_beta2 != 0.999:
        lines.append(_line("adam_beta2", stage.adam_beta2))
    if stage.bf16:
        lines.append(_line("bf16", True, "false computes in float32"))
    if stage.start is not None:
        lines.append(_line("pretrained_checkpoint", stage.start, stage.start_comment))
    lines += [
        _line("save", stage.save, "checkpoints, metrics.jsonl, TensorBoard; started again, the run resumes"),
        _line("save_interval", interval, "steps between checkpoints, and between evaluations"),
        _line("save_total_limit", 2, "newest checkpoints that are kept"),
    ]
    if data.valid_paths or data.valid_share:
        lines.append(_line("best_metric", "eval_loss", "the weights with the lowest are kept in SAVE/best"))
    lines.append(_line("log_interval", max(1, min(10, interval))))
    where = "random weights" if stage.start is None else "as the initial weights need it; change nothing here"
    changed = list(_changed_settings(model))
    if changed:
        lines += [f"model:  # {where}", *changed]
    return "\n".join(lines) + "\n"


_ASPECT_RATIOS = {
    "anyres": "a base view and tiles; square and pad: one tile an image",
    "square": "one tile an image",
}


def _changed_settings(model: ModelConfig) -> Iterator[str]:
    """The settings of a model that are not the defaults, with the headings of their sections."""
    defaults = {setting.key: setting.value for setting in iter_settings(ModelConfig())}
    section = ""
    changed = [setting for setting in iter_settings(model) if setting.value != defaults[setting.key]]
    # Settings of the model itself come first: a section's heading holds for all that follows.
    for setting in sorted(changed, key=lambda setting: "." in setting.key):
        parent, _, name = setting.key.rpartition(".")
        if parent != section:
            section = parent
            yield f"  {parent}:"
        indent = "    " if parent else "  "
        yield f"{indent}{name}: {_yaml(setting.value)}"


def _line(name: str, value: Any, comment: str = "") -> str:
    text = f"  {name}: {_yaml(value)}"
    return f"{text:<{_COMMENT_COLUMN}}  # {comment}" if comment else text


def _yaml(value: Any) -> str:
    """On one line."""
    return yaml.safe_dump([value], default_flow_style=True, width=2**31, allow_unicode=True).strip()[1:-1]
