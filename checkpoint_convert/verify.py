"""Are two checkpoints the same model?

python -m checkpoint_convert.verify A B [--weights-only] [--tolerance X]

A and B are each a Megatron checkpoint of any layout or a Hugging Face folder of any layout that is read here. Compared
are all tensors, one pair in memory at a time, then the settings that decide what is computed and the tokenizers, then
the logits and greedy tokens of a few prompts, one model in memory at a time. Where one side is a part (a tower, a
decoder, a projector), the other's same part is compared, and no answers. Exit code 0: the same; 1: different; 2: they
cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from checkpoint_convert.compare import Comparison, compare_tensors, part_of
from checkpoint_convert.errors import ConversionError, run_command, some_of
from checkpoint_convert.huggingface.tokenizer import import_tokenizer
from checkpoint_convert.mapping.param_map import name_map
from checkpoint_convert.model_source import PARTS, Source, open_source
from checkpoint_convert.probe_outputs import Answer, answers, built_in_prompts
from megatron_vlm.data.processing.tokenizer import Tokenizer

DESCRIPTION = "Compare two checkpoints: weights, settings, tokenizer, logits and greedy tokens."
SAME, DIFFERENT, INCOMPARABLE = 0, 1, 2
LOGITS_TOLERANCE = 1e-4
_CONTEXT = "language.max_position_embeddings"
_OF_THE_WHOLE = ("vision.vision_feature_layer", "vision.image_normalization")
"""Settings of a tower that only the model around it decides."""


def verify(
    first: Path,
    second: Path,
    *,
    tolerance: float = 0.0,
    logits_tolerance: float = LOGITS_TOLERANCE,
    weights_only: bool = False,
) -> bool:
    """Compare, print what was found, and return whether it is the same model.

    Args:
        first: Megatron checkpoint or Hugging Face folder.
        second: another.
        tolerance: of a difference between two weights; 0: bit for bit.
        logits_tolerance: of a difference between two logits, both computed in fp32.
        weights_only: neither tokenizers nor answers.

    Raises:
        ConversionError: one of them is no model that can be read, or they have no part in common.
    """
    a, b = open_source(first), open_source(second)
    parts = [part for part in a.parts if part in b.parts]
    if not parts:
        raise ConversionError(
            f"{first} ({a.kind}) has {', '.join(a.parts)} and {second} ({b.kind}) {', '.join(b.parts)}: no common part"
        )
    _print_sources(a, b, parts)
    found = compare_tensors(a.tensors, b.tensors, _names(a, b, parts), tolerance)
    _print_weights(found)
    settings = _settings(a, b, parts)
    same = found.same and not settings
    comparable = found.same_names_and_shapes and not settings
    if weights_only or len(parts) < len(PARTS):
        return same
    with TemporaryDirectory() as folder:
        words = [_tokenizer(source, Path(folder) / letter) for letter, source in (("A", a), ("B", b))]
        told = _tokenizers(*words)
        print(f"tokenizer  {told or 'the same ids'}")
        if told or not comparable:
            print("answers    not compared: the two would not be asked the same")
            return False
        assert a.model is not None
        prompts = built_in_prompts(a.model)
        of_a = answers(a, words[0], prompts)
        of_b = answers(b, words[1], prompts)
        return _print_answers(of_a, of_b, logits_tolerance) and same


def _tokenizer(source: Source, folder: Path) -> Tokenizer:
    try:
        return import_tokenizer(source.tokenizer, folder)
    except ConversionError as error:
        raise ConversionError(
            f"{source.path} has no tokenizer that can be read, so that it cannot be asked anything: compare with "
            "--weights-only"
        ) from error


def _print_sources(a: Source, b: Source, parts: list[str]) -> None:
    for letter, source in (("A", a), ("B", b)):
        print(f"{letter}  {source.path}  ({source.kind}: {', '.join(source.parts)})")
    if len(parts) < len(PARTS):
        print(f"compared: {', '.join(parts)}")
    print()


def _names(a: Source, b: Source, parts: list[str]) -> list[str]:
    """All names of the common parts, in the order in which a checkpoint is read fastest."""
    expected = [name for entry in name_map(a.model) for name in entry.hf] if a.model else []
    names = list(dict.fromkeys([*expected, *a.tensors, *b.tensors]))
    return names if len(parts) == len(PARTS) else [name for name in names if part_of(name) in parts]


def _print_weights(found: Comparison) -> None:
    print(f"{'part':<11}{'tensors':>8}{'equal':>8}{'close':>8}{'differ':>8}  {'largest difference':<20}in")
    for name, part in found.parts.items():
        if part.tensors:
            largest = f"{part.largest:.3g}" if part.worst else "0"
            numbers = f"{part.tensors:>8}{part.equal:>8}{part.close:>8}{part.differ:>8}"
            print(f"{name:<11}{numbers}  {largest:<20}{part.worst or '-'}")
    print()
    unequal = sum(part.tensors - part.equal for part in found.parts.values())
    for (first, second), count in found.dtypes.items():
        if first != second:
            print(f"dtypes     {count} tensors are {_name(first)} in A and {_name(second)} in B; values were compared")
    if unequal and found.rounded == unequal:
        print("           all that differ are the same numbers, rounded to the narrower dtype")
    worst_first = sorted(found.differing, key=lambda name: -found.differing[name])
    for title, names in (
        ("values differ", [f"{name}: {found.differing[name]:.3g}" for name in worst_first]),
        ("only in A, or in neither", found.only_first),
        ("only in B", found.only_second),
        ("shapes differ, A and B", found.shapes),
    ):
        if names:
            print(f"{title} ({len(names)}):\n{some_of(names)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _settings(a: Source, b: Source, parts: list[str]) -> list[str]:
    """Print which settings differ, and return those that change what is computed."""
    theirs, others = _flat(a), _flat(b)
    whole = a.model is not None and b.model is not None
    names = [
        name
        for name in theirs
        if name in others
        and (whole or (name.partition(".")[0] in parts and name not in _OF_THE_WHOLE))
        and theirs[name] != others[name]
    ]
    counted = [name for name in names if name != _CONTEXT]
    told = [f"{name} is {theirs[name]} in A and {others[name]} in B" for name in counted]
    print(f"settings   {'differ' if told else 'the same'}" + (f"\n{some_of(told)}" if told else ""))
    if _CONTEXT in names:
        print(
            f"           (trained context {theirs[_CONTEXT]} in A, {others[_CONTEXT]} in B: nothing computed differs)"
        )
    return told


def _flat(source: Source) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for part, config in (("vision", source.vision), ("language", source.language)):
        if config:
            settings |= {f"{part}.{name}": value for name, value in asdict(config).items()}
    if source.model:
        settings["image_token_index"] = source.model.image_token_index
        settings["image_grid_pinpoints"] = source.model.image_grid_pinpoints
        settings["image_aspect_ratio"] = source.aspect_ratio
    return settings


def _tokenizers(a: Tokenizer, b: Tokenizer) -> str:
    """How two tokenizers differ; nothing where they give the same ids (the files may be of two kinds)."""
    if a.fingerprint == b.fingerprint:
        return ""
    for what, first, second in (
        ("length", len(a), len(b)),
        ("end-of-sequence id", a.eos_id, b.eos_id),
        ("padding id", a.pad_id, b.pad_id),
    ):
        if first != second:
            return f"differs: {what} is {first} in A and {second} in B"
    for number in range(len(a)):
        texts = [words.decode([number], skip_special_tokens=False) for words in (a, b)]
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
"""What two tokenizers of the same words must still agree on: spaces, merges, and what is cut before merging."""


def _print_answers(a: dict[str, Answer], b: dict[str, Answer], tolerance: float) -> bool:
    print(f"\n{'prompt':<11}{'positions':>10}  {'largest difference of logits':<30}greedy tokens")
    same = True
    for name, first in a.items():
        second = b[name]
        apart = float((first.logits - second.logits).abs().max())
        same = same and apart <= tolerance and first.tokens == second.tokens
        print(f"{name:<11}{len(first.logits):>10}  {apart:<30.3g}{_told_tokens(first.tokens, second.tokens)}")
    print(f"{'':<11}{'':>10}  (at most {tolerance:g} is the same; fp32)")
    return same


def _told_tokens(a: list[int], b: list[int]) -> str:
    if a == b:
        return f"{len(a)}, the same"
    common = next((n for n, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
    return f"part after {common}: {a[common : common + 3]} in A, {b[common : common + 3]} in B"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_convert.verify", description=DESCRIPTION)
    for name in ("A", "B"):
        parser.add_argument(name, type=Path, help="Megatron checkpoint or Hugging Face folder")
    parser.add_argument("--tolerance", type=float, default=0.0, help="of weights; default 0: bit for bit")
    parser.add_argument(
        "--logits-tolerance", type=float, default=LOGITS_TOLERANCE, help=f"of logits; default {LOGITS_TOLERANCE:g}"
    )
    parser.add_argument("--weights-only", action="store_true", help="no tokenizers and no answers: for huge models")
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
