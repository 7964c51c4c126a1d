"""The name map is whole and every entry of it matters: dropped or swapped, some comparison with transformers fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.mapping.param_map import VISION, Entry, name_map, to_hf, to_megatron
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
    }  # as wide inside: more that can be swapped
    language = GROUPED_QUERY_SIZES | {"num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 6}
    reference = llava_next_model(vision=vision, language=language)
    with megatron_model(reference) as model:
        yield model, reference


@pytest.fixture(scope="module")
def agrees(pair: tuple[VisionLanguageModel, Any]) -> Compare:
    """Does the model agree with transformers when it is filled through these entries?"""
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
        fill(model, ((e.megatron, e.rule.to_megatron([tensors[name] for name in e.hf])) for e in entries))
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
    entries = name_map(model_config(reference))
    assert sorted(e.megatron for e in entries) == sorted(tensors_of(model))
    assert sorted(name for e in entries for name in e.hf) == sorted(canonical_tensors(reference))


def test_the_whole_map_agrees(pair: tuple[VisionLanguageModel, Any], agrees: Compare) -> None:
    assert agrees(name_map(model_config(pair[1])))


def test_an_entry_that_is_dropped_is_noticed(pair: tuple[VisionLanguageModel, Any], agrees: Compare) -> None:
    entries = name_map(model_config(pair[1]))
    unnoticed = [e.megatron for i, e in enumerate(entries) if agrees(entries[:i] + entries[i + 1 :])]
    assert unnoticed == []


def test_entries_that_are_swapped_are_noticed(pair: tuple[VisionLanguageModel, Any], agrees: Compare) -> None:
    """All pairs of entries whose tensors have the same shapes."""
    entries = name_map(model_config(pair[1]))
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(len(entries)), 2)
        if entries[i].hf_shapes == entries[j].hf_shapes
    ]
    alone = {e.megatron for i, e in enumerate(entries) if not any(i in pair for pair in pairs)}
    assert alone == {"vision_model.patch_embedding.weight", "vision_model.position_embedding.weight"}
    unnoticed = [(entries[i].megatron, entries[j].megatron) for i, j in pairs if agrees(_swapped(entries, i, j))]
    assert unnoticed == []


def test_tensors_that_are_swapped_inside_an_entry_are_noticed(
    pair: tuple[VisionLanguageModel, Any], agrees: Compare
) -> None:
    entries = name_map(model_config(pair[1]))
    unnoticed, tried = [], 0
    for i, entry in enumerate(entries):
        for order in itertools.permutations(entry.hf):
            if order == entry.hf:
                continue
            tried += 1
            if agrees([*entries[:i], replace(entry, hf=order), *entries[i + 1 :]]):
                unnoticed.append(order)
    assert unnoticed == []
    assert tried == 2 * 2 * 5 + 2 * (5 + 1)  # weight and bias of 2 tower layers; qkv and gate-up of 2 language layers


def test_there_and_back_is_bit_for_bit(pair: tuple[VisionLanguageModel, Any]) -> None:
    _, reference = pair
    entries, tensors = name_map(model_config(reference)), canonical_tensors(reference)
    back = dict(to_hf(entries, dict(to_megatron(entries, tensors, "a")), "b"))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_tensors_that_do_not_fit_are_told_at_once(pair: tuple[VisionLanguageModel, Any]) -> None:
    _, reference = pair
    entries, tensors = name_map(model_config(reference)), canonical_tensors(reference)
    del tensors["image_newline"]
    tensors["language_model.model.norm.weight"] = torch.ones(3)
    tensors["multi_modal_projector.linear_1.bias"] = torch.ones(7)
    with pytest.raises(ConversionError) as refused:
        to_megatron(entries, tensors, "the folder X")
    told = str(refused.value)
    assert "the folder X" in told
    assert "missing:\n  image_newline" in told
    assert "no place in this model:\n  language_model.model.norm.weight" in told
    assert "multi_modal_projector.linear_1.bias: (7,), the config says (48,)" in told
