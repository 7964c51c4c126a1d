"""Our model gives transformers' features and logits, with the same weights in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_vlm.data.rows.rank_batch import tile_documents
from megatron_vlm.model.vlm import VisionLanguageModel
from tests.checkpoint_convert.whole_model import (
    SINGLE,
    TALL,
    WIDE,
    megatron_model,
    model_config,
    our_features,
    our_logits,
    prompt,
)
from tests.support.random_models import FAMILIES, GROUPED_QUERY_SIZES, LANGUAGE_SIZES, VISION_SIZES, llava_next_model

TOLERANCE = 1e-4
CASES: dict[str, dict[str, Any]] = {
    "tied": {"language": LANGUAGE_SIZES},
    "grouped-query, own head, gelu": {
        "language": GROUPED_QUERY_SIZES,
        "vision": VISION_SIZES | {"hidden_act": "gelu", "num_hidden_layers": 3},
    },
    **FAMILIES,
}
PROMPTS = {"text": [], "single tile": [SINGLE], "tall": [TALL], "wide": [WIDE], "two images": [WIDE, TALL]}


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[VisionLanguageModel, Any]]:
    reference = llava_next_model(**CASES[request.param])
    with megatron_model(reference) as model:
        yield model, reference


@torch.no_grad()
def test_tower_features(pair: tuple[VisionLanguageModel, Any]) -> None:
    model, reference = pair
    tiles = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    layer, skipped = reference.config.vision_feature_layer, int(model.vision_model.vision.class_token)
    wanted = reference.model.vision_tower(tiles, output_hidden_states=True).hidden_states[layer][:, skipped:]
    hidden = model.vision_model(tiles, tile_documents(len(tiles), model.view))
    ours = model.vision_model.drop_class_tokens(hidden[:, 0], len(tiles))
    assert (ours - wanted).abs().max() < TOLERANCE
    assert wanted.std() > 0.1


@pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS.keys())
@torch.no_grad()
def test_merged_features_and_logits(pair: tuple[VisionLanguageModel, Any], sizes: list[tuple[int, int]]) -> None:
    model, reference = pair
    batch, inputs = prompt(model_config(reference), sizes)
    if sizes:
        outputs = reference.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        wanted = torch.cat(list(outputs.pooler_output))
        assert (our_features(model, batch) - wanted).abs().max() < TOLERANCE
    wanted = reference(**inputs).logits[0]
    ours = our_logits(model, batch)
    assert (ours - wanted).abs().max() < TOLERANCE
    assert wanted.std() > 0.1


def test_prompts_cover_every_shape_of_grid(pair: tuple[VisionLanguageModel, Any]) -> None:
    model = model_config(pair[1])
    tiles = {name: prompt(model, sizes)[0].num_tiles for name, sizes in PROMPTS.items()}
    assert tiles == {"text": 0, "single tile": 2, "tall": 4, "wide": 4, "two images": 8}
