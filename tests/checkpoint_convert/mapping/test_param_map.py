"""The parameter map is complete, and every entry matters: dropping or swapping one is detected."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.mapping.param_map import VISION, Entry, param_map, to_hf, to_megatron
from checkpoint_convert.megatron.files import tensors_of
from megatron_vlm.model.vlm import VisionLanguageModel
from tests.checkpoint_convert.whole_model import (
    SINGLE,
    canonical_tensors,
    fill,
    megatron_model,
    model_config,
    our_features,
    our_logits,
    prompt,
)
from tests.support.random_models import GROUPED_QUERY_SIZES, VISION_SIZES, llava_next_model

TOLERANCE = 1e-4
UNUSED = "vision_model.unused."
Compare = Callable[[list[Entry]], bool]


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[VisionLanguageModel, Any]]:
    vision = VISION_SIZES | {
        "num_hidden_layers": 3,
        "intermediate_size": 48,
    }  # equal widths allow more swaps
    language = GROUPED_QUERY_SIZES | {"num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 6}
    reference = llava_next_model(vision=vision, language=language)
    with megatron_model(reference) as model:
        yield model, reference


@pytest.fixture(scope="module")
def agrees(pair: tuple[VisionLanguageModel, Any]) -> Compare:
    """Whether the model agrees with transformers if its weights are loaded through these entries."""
    model, reference = pair
    tensors = canonical_tensors(reference)
    batch, inputs = prompt(model_config(reference), [SINGLE])
    with torch.no_grad():
        wanted_features = reference.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
        wanted = reference(**inputs).logits[0]

    def compare(entries: list[Entry]) -> bool:
        with torch.no_grad():
            for tensor in tensors_of(model).values():
                tensor.zero_()
        fill(model, ((e.megatron, e.transform.to_megatron([tensors[name] for name in e.hf])) for e in entries))
        unused = {name.removeprefix(UNUSED): t for name, t in tensors_of(model).items() if name.startswith(UNUSED)}
        return (
            bool((our_features(model, batch) - wanted_features).abs().max() < TOLERANCE)
            and bool((our_logits(model, batch) - wanted).abs().max() < TOLERANCE)
            and all(torch.equal(t, tensors[VISION + name.replace("__", ".")]) for name, t in unused.items())
        )

    return compare


def _swapped(entries: list[Entry], i: int, j: int) -> list[Entry]:
    """Entries i and j, each with the other's Hugging Face tensors."""
    swapped = list(entries)
    swapped[i], swapped[j] = replace(entries[i], hf=entries[j].hf), replace(entries[j], hf=entries[i].hf)
    return swapped


def test_the_map_names_exactly_the_tensors_of_both_models(pair: tuple[VisionLanguageModel, Any]) -> None:
    model, reference = pair
    entries = param_map(model_config(reference))
    assert sorted(e.megatron for e in entries) == sorted(tensors_of(model))
    assert sorted(name for e in entries for name in e.hf) == sorted(canonical_tensors(reference))


def test_the_whole_map_agrees(pair: tuple[VisionLanguageModel, Any], agrees: Compare) -> None:
    assert agrees(param_map(model_config(pair[1])))


def test_a_missing_entry_is_detected(pair: tuple[VisionLanguageModel, Any], agrees: Compare) -> None:
    entries = param_map(model_config(pair[1]))
    undetected = [e.megatron for i, e in enumerate(entries) if agrees(entries[:i] + entries[i + 1 :])]
    assert undetected == []


def test_swapped_entries_are_detected(pair: tuple[VisionLanguageModel, Any], agrees: Compare) -> None:
    """All pairs of entries whose tensors have the same shapes."""
    entries = param_map(model_config(pair[1]))
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(len(entries)), 2)
        if entries[i].hf_shapes == entries[j].hf_shapes
    ]
    alone = {e.megatron for i, e in enumerate(entries) if not any(i in pair for pair in pairs)}
    assert alone == {"vision_model.patch_embedding.weight", "vision_model.position_embedding.weight"}
    undetected = [(entries[i].megatron, entries[j].megatron) for i, j in pairs if agrees(_swapped(entries, i, j))]
    assert undetected == []


def test_swapped_tensors_of_one_entry_are_detected(pair: tuple[VisionLanguageModel, Any], agrees: Compare) -> None:
    entries = param_map(model_config(pair[1]))
    undetected, tried = [], 0
    for i, entry in enumerate(entries):
        for order in itertools.permutations(entry.hf):
            if order == entry.hf:
                continue
            tried += 1
            if agrees([*entries[:i], replace(entry, hf=order), *entries[i + 1 :]]):
                undetected.append(order)
    assert undetected == []
    assert tried == 2 * 2 * 5 + 2 * (5 + 1)  # weight and bias of 2 tower layers; qkv and gate-up of 2 language layers


def test_there_and_back_is_bit_for_bit(pair: tuple[VisionLanguageModel, Any]) -> None:
    _, reference = pair
    entries, tensors = param_map(model_config(reference)), canonical_tensors(reference)
    back = dict(to_hf(entries, dict(to_megatron(entries, tensors, "a")), "b"))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_all_mismatches_are_reported_together(pair: tuple[VisionLanguageModel, Any]) -> None:
    _, reference = pair
    entries, tensors = param_map(model_config(reference)), canonical_tensors(reference)
    del tensors["image_newline"]
    tensors["language_model.model.norm.weight"] = torch.ones(3)
    tensors["multi_modal_projector.linear_1.bias"] = torch.ones(7)
    with pytest.raises(ConversionError) as rejected:
        to_megatron(entries, tensors, "the folder X")
    reported = str(rejected.value)
    assert "the folder X" in reported
    assert "missing tensors:\n  image_newline" in reported
    assert "unexpected tensors:\n  language_model.model.norm.weight" in reported
    assert "multi_modal_projector.linear_1.bias: (7,), the config says (48,)" in reported
