"""Row length, batch size and epochs from the lengths of the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_vlm.new_recipe.choices import Lengths, choose


@pytest.mark.parametrize(
    ("samples", "tokens", "tiles", "context", "expected"),
    [
        # The published instruction mix: rows of the real recipe, LLaVA's 128 samples, one pass.
        (
            1_000_000,
            2270,
            4,
            32768,
            {"seq_length": 32768, "max_tiles_per_row": 64, "global_batch_size": 8, "epochs": 1},
        ),
        # The model's context is shorter than the samples.
        (5_000, 6000, 4, 4096, {"seq_length": 32768, "oversized": True, "epochs": 3}),
        # Few data: small steps, so that there are some.
        (40, 700, 3, 4096, {"seq_length": 16384, "global_batch_size": 1, "epochs": 3, "oversized": False}),
        (12_000, 36, 1, 4096, {"seq_length": 1024, "max_tiles_per_row": 64, "global_batch_size": 4, "epochs": 3}),
    ],
)
def test_of_a_model_that_is_trained_further(
    samples: int, tokens: int, tiles: int, context: int, expected: dict[str, Any]
) -> None:
    lengths = Lengths.of(np.full(samples, tokens), np.full(samples, tiles))
    choices = choose(lengths, context, from_scratch=False)
    assert {name: getattr(choices, name) for name in expected} == expected
    assert choices.seq_length >= min(lengths.longest, context)


def test_a_row_holds_the_longest_sample_and_its_tiles() -> None:
    lengths = Lengths.of(np.array([10] * 99 + [3000]), np.array([1] * 99 + [200]))
    choices = choose(lengths, None, from_scratch=True)
    assert (choices.seq_length, choices.max_tiles_per_row, choices.oversized) == (4096, 512, False)
    # A row of 103 samples has 306 tiles.
    assert choices.epochs > 100  # a model from random weights sees the few samples often
    assert choose(lengths, None, from_scratch=True, passes=7).epochs == 7


def test_text_alone_has_no_tiles() -> None:
    assert choose(Lengths.of(np.full(10, 50), np.zeros(10, int)), 1024, from_scratch=False).global_batch_size == 1
