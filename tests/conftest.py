"""What tests of several packages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.environments import OLDER, QUANTIZERS, Environment, for_inference, on_top_of


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Process groups of a world of one, in the test's own process, until the end of the module."""
    import megatron_vlm.runtime.megatron_patches  # noqa: F401
    from megatron_vlm.config import ParallelConfig
    from megatron_vlm.runtime.launch import distributed

    with distributed(ParallelConfig()):
        yield


@pytest.fixture(scope="session")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """What the extra `inference` installs, with transformers 5."""
    return for_inference(tmp_path_factory.mktemp("environments"))


@pytest.fixture(scope="session")
def older(inference: Environment) -> Environment:
    """The same with transformers 4.57."""
    return on_top_of(inference, inference.folder.with_name("older"), *OLDER)


@pytest.fixture(scope="session")
def quantizing(inference: Environment) -> Environment:
    """The same with bitsandbytes."""
    return on_top_of(inference, inference.folder.with_name("quantizing"), *QUANTIZERS)
