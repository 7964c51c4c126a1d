"""The log line's durations."""

from __future__ import annotations

import pytest

from megatron_vlm.training.metrics.log import describe_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (3 * 3600 + 120, "3 h 2 min"), (90 * 3600, "3 d 18 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert describe_duration(seconds) == text
