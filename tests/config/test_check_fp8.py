"""FP8 needs Transformer Engine, bf16, and sizes that are multiples of 16 on every rank."""

from __future__ import annotations

from typing import Any

import pytest

FP8 = {"training.fp8_format": "hybrid", "training.transformer_impl": "transformer_engine", "training.bf16": True}


def test_a_recipe_that_can_use_it(problems_of: Any) -> None:
    assert not problems_of(FP8)
    # Without FP8, no size matters.
    assert not problems_of({"model.language.intermediate_size": 132})


@pytest.mark.parametrize(
    ("settings", "where", "what"),
    [
        ({"training.transformer_impl": "local"}, "training.fp8_format = hybrid", "has no FP8"),
        ({"training.bf16": False}, "training.fp8_format = hybrid", "Set bf16 = true"),
        ({"data.seq_length": 120}, "data.seq_length = 120", "Use 112 or 128"),
        ({"model.language.intermediate_size": 136}, "model.language.intermediate_size = 136", "Use 128 or 144"),
        (
            {"training.fp8_recipe": "mxfp8", "model.language.intermediate_size": 144},
            "model.language.intermediate_size = 144",
            "a multiple of 32",
        ),
        (
            {"model.language.head_dim": 6, "model.language.num_key_value_heads": 2},
            "model.language.num_attention_heads = 8",
            "have 72 columns",
        ),
    ],
)
def test_what_keeps_it_from_working(problems_of: Any, settings: dict[str, Any], where: str, what: str) -> None:
    found = problems_of(FP8 | settings, 1)
    assert len(found) == 1 and where in found[0] and what in found[0]
