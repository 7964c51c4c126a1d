"""What tests of several packages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Process groups of a world of one, in the test's own process, until the end of the module."""
    import megatron_vlm.runtime  # noqa: F401
    from megatron_vlm.config import ParallelConfig
    from megatron_vlm.runtime.launch import distributed

    with distributed(ParallelConfig()):
        yield
