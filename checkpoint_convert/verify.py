"""Are two checkpoints the same model?

python -m checkpoint_convert.verify A B [--weights-only] [--tolerance X]

A and B are each a Megatron checkpoint of any parallel layout or a Hugging Face folder of any supported format. The
command compares all tensors, one pair in memory at a time; the settings that change the computation and the tokenizers;
and the logits and greedy tokens of a few prompts, one model in memory at a time. If one side is only a part (vision
tower, language model or projector), it is compared with the same part of the other, without outputs. Exit code 0: the
same; 1: different; 2: not comparable.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from checkpoint_convert.compare import Comparison, compare_tensors
from checkpoint_convert.errors import ConversionError, run_command, some_of
from checkpoint_convert.huggingface.tokenizer import import_tokenizer
from checkpoint_convert.mapping.hf_names import model_part
from checkpoint_convert.mapping.param_map import param_map
from checkpoint_convert.model_source import Source, open_source
from checkpoint_convert.probe_outputs import ProbeOutput, built_in_prompts, probe_outputs
from megatron_vlm.commands.number_flags import number_from_0
from megatron_vlm.config import PARTS
from megatron_vlm.data.processing.tokenizer import Tokenizer

DESCRIPTION = "Compare two checkpoints: weights, settings, tokenizer, logits and greedy tokens."
SAME, DIFFERENT, INCOMPARABLE = 0, 1, 2
LOGITS_TOLERANCE = 1e-4
_CONTEXT = "language.max_position_embeddings"
_WHOLE_MODEL_SETTINGS = ("vision.vision_feature_layer", "vision.image_normalization")
"""Settings of a tower that are set by a whole model, not by a tower alone."""


def verify(
    first: Path,
    second: Path,
    *,
    tolerance: float = 0.0,
    logits_tolerance: float = LOGITS_TOLERANCE,
    weights_only: bool = False,
) -> bool:
    """Compare two models, print the result, and return whether they are the same.

    Args:
        first: Megatron checkpoint or Hugging Face folder.
        second: another one.
        tolerance: largest accepted difference of two weights; 0 compares bit for bit.
        logits_tolerance: largest accepted difference of two logits, both computed in fp32.
        weights_only: compare neither tokenizers nor outputs.

    Raises:
        ConversionError: one of them cannot be read, or they have no part in common.
    """
    a, b = open_source(first), open_source(second)
    parts = [part for part in a.parts if part in b.parts]
    if not parts:
        raise ConversionError(
            f"no common part: {first} ({a.format}) has {', '.join(a.parts)}, {second} ({b.format}) "
            f"{', '.join(b.parts)}. Give models that share a part"
        )
    _print_sources(a, b, parts)
    weights = compare_tensors(a.tensors, b.tensors, _names(a, b, parts), tolerance)
    _print_weights(weights)
    differing_settings = _compare_settings(a, b, parts)
    same = weights.same and not differing_settings
    comparable = weights.same_names_and_shapes and not differing_settings
    if weights_only or len(parts) < len(PARTS):
        return same
    with TemporaryDirectory() as folder:
        tokenizers = [_load_tokenizer(source, Path(folder) / letter) for letter, source in (("A", a), ("B", b))]
        difference = _tokenizer_difference(*tokenizers)
        print(f"tokenizer  {difference or 'the same ids'}")
        if difference or not comparable:
            print("outputs    not compared: the models do not take the same inputs")
            return False
        assert a.model is not None
        prompts = built_in_prompts(a.model)
        outputs_a = probe_outputs(a, tokenizers[0], prompts)
        outputs_b = probe_outputs(b, tokenizers[1], prompts)
        return _print_outputs(outputs_a, outputs_b, logits_tolerance) and same


def _load_tokenizer(source: Source, folder: Path) -> Tokenizer:
    try:
        return import_tokenizer(source.tokenizer, folder)
    except ConversionError as error:
        raise ConversionError(
            f"{source.path} has no tokenizer that can be read, which outputs need: compare with --weights-only"
        ) from error


def _print_sources(a: Source, b: Source, parts: list[str]) -> None:
    for letter, source in (("A", a), ("B", b)):
        print(f"{letter}  {source.path}  ({source.format}: {', '.join(source.parts)})")
    if len(parts) < len(PARTS):
        print(f"compared: {', '.join(parts)}")
    print()


def _names(a: Source, b: Source, parts: list[str]) -> list[str]:
    """Tensor names of the common parts, first in the parameter map's order, in which a checkpoint is read fastest."""
    expected = [name for entry in param_map(a.model) for name in entry.hf] if a.model else []
    names = list(dict.fromkeys([*expected, *a.tensors, *b.tensors]))
    return names if len(parts) == len(PARTS) else [name for name in names if model_part(name) in parts]


def _print_weights(weights: Comparison) -> None:
    print(f"{'part':<11}{'tensors':>8}{'equal':>8}{'close':>8}{'differ':>8}  {'largest difference':<20}in")
    for name, part in weights.parts.items():
        if part.tensors:
            largest = f"{part.largest:.3g}" if part.worst else "0"
            numbers = f"{part.tensors:>8}{part.equal:>8}{part.close:>8}{part.differ:>8}"
            print(f"{name:<11}{numbers}  {largest:<20}{part.worst or '-'}")
    print()
    unequal = sum(part.tensors - part.equal for part in weights.parts.values())
    for (first, second), count in weights.dtypes.items():
        if first != second:
            print(f"dtypes     {count} tensors are {_name(first)} in A and {_name(second)} in B; values were compared")
    if unequal and weights.rounded == unequal:
        print("           all differences are roundings to the narrower dtype")
    worst_first = sorted(weights.differing, key=lambda name: -weights.differing[name])
    for title, names in (
        ("values differ", [f"{name}: {weights.differing[name]:.3g}" for name in worst_first]),
        ("only in A, or in neither", weights.only_first),
        ("only in B", weights.only_second),
        ("shapes differ, A and B", weights.shapes),
    ):
        if names:
            print(f"{title} ({len(names)}):\n{some_of(names)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compare_settings(a: Source, b: Source, parts: list[str]) -> list[str]:
    """Print which settings differ, and return those that change the computation."""
    settings_a, settings_b = _settings(a), _settings(b)
    whole = a.model is not None and b.model is not None
    names = [
        name
        for name in settings_a
        if name in settings_b
        and (whole or (name.partition(".")[0] in parts and name not in _WHOLE_MODEL_SETTINGS))
        and settings_a[name] != settings_b[name]
    ]
    lines = [f"{name} is {settings_a[name]} in A and {settings_b[name]} in B" for name in names if name != _CONTEXT]
    print(f"settings   {'differ' if lines else 'the same'}" + (f"\n{some_of(lines)}" if lines else ""))
    if _CONTEXT in names:
        print(
            f"           (trained context {settings_a[_CONTEXT]} in A, {settings_b[_CONTEXT]} in B: it does not change "
            "the computation)"
        )
    return lines


def _settings(source: Source) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for part, config in (("vision", source.vision), ("language", source.language)):
        if config:
            settings |= {f"{part}.{name}": value for name, value in asdict(config).items()}
    if source.model:
        settings["image_token_index"] = source.model.image_token_index
        settings["image_grid_pinpoints"] = source.model.image_grid_pinpoints
        settings["image_aspect_ratio"] = source.aspect_ratio
    return settings


def _tokenizer_difference(a: Tokenizer, b: Tokenizer) -> str:
    """How two tokenizers differ; empty if they give the same ids, even from files of different formats."""
    if a.fingerprint == b.fingerprint:
        return ""
    for name, first, second in (
        ("length", len(a), len(b)),
        ("end-of-sequence id", a.eos_id, b.eos_id),
        ("padding id", a.pad_id, b.pad_id),
    ):
        if first != second:
            return f"differs: {name} is {first} in A and {second} in B"
    for number in range(len(a)):
        texts = [tokenizer.decode([number], skip_special_tokens=False) for tokenizer in (a, b)]
        if texts[0] != texts[1]:
            return f"differs: id {number} is {texts[0]!r} in A and {texts[1]!r} in B"
    for text in _TEXTS:
        if a.encode(text) != b.encode(text):
            return f"differs: {text!r} becomes {a.encode(text)} in A and {b.encode(text)} in B"
    return ""


_TEXTS = (
    "Describe the image, then count to three: 1, 2, 3.\n",
    "  two  spaces\tand a tab\r\n\nnew lines",
    "Ünïcödé, 漢字, emoji 🙂, maths ∑x²≥0",
    "<|user|>\nWhat?\n<|assistant|>\n",
    "don't they're I'LL 12345 3.14 a_b camelCase https://x.org/?q=1",
)
"""Texts that tokenizers of the same vocabulary may still encode differently: spaces, merges, pre-tokenization."""


def _print_outputs(a: dict[str, ProbeOutput], b: dict[str, ProbeOutput], tolerance: float) -> bool:
    print(f"\n{'prompt':<11}{'positions':>10}  {'largest difference of logits':<30}greedy tokens")
    same = True
    for name, first in a.items():
        second = b[name]
        largest = float((first.logits - second.logits).abs().max())
        same = same and largest <= tolerance and first.tokens == second.tokens
        print(f"{name:<11}{len(first.logits):>10}  {largest:<30.3g}{_describe_tokens(first.tokens, second.tokens)}")
    print(f"{'':<11}{'':>10}  (at most {tolerance:g} is the same; fp32)")
    return same


def _describe_tokens(a: list[int], b: list[int]) -> str:
    if a == b:
        return f"{len(a)}, the same"
    common = next((n for n, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
    return f"differ after {common}: {a[common : common + 3]} in A, {b[common : common + 3]} in B"


def main(argv: list[str] | None = None, prog: str = "python -m checkpoint_convert.verify") -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog, description=DESCRIPTION)
    for name in ("A", "B"):
        parser.add_argument(name, type=Path, help="Megatron checkpoint or Hugging Face folder")
    parser.add_argument(
        "--tolerance",
        type=number_from_0,
        default=0.0,
        help="accepted difference of weights; default 0: bit for bit",
    )
    parser.add_argument(
        "--logits-tolerance",
        type=number_from_0,
        default=LOGITS_TOLERANCE,
        help=f"accepted difference of logits; default {LOGITS_TOLERANCE:g}",
    )
    parser.add_argument(
        "--weights-only", action="store_true", help="compare neither tokenizers nor outputs; for very large models"
    )
    args = parser.parse_args(argv)
    verdict = SAME

    def command() -> None:
        nonlocal verdict
        same = verify(
            args.A,
            args.B,
            tolerance=args.tolerance,
            logits_tolerance=args.logits_tolerance,
            weights_only=args.weights_only,
        )
        print("\nthe same" if same else "\nDIFFERENT")
        verdict = SAME if same else DIFFERENT

    code = run_command(command)
    return INCOMPARABLE if code == 1 else code or verdict


if __name__ == "__main__":
    sys.exit(main())
