"""Fixtures for the tests of several packages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.environments import QUANTIZATION, TRANSFORMERS_4, Environment, inference_environment, overlay
from tests.support.s3_server import Proxy, store


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Process groups of world size 1 in the test's own process, for the whole module."""
    import megatron_vlm.runtime.megatron_patches  # noqa: F401
    from megatron_vlm.config import ParallelConfig
    from megatron_vlm.runtime.launch import distributed

    with distributed(ParallelConfig()):
        yield


@pytest.fixture(scope="module")
def one_store() -> Iterator[Proxy]:
    """An S3 server, for the whole module."""
    with store() as running:
        yield running


@pytest.fixture(scope="session")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the extra `inference` and transformers 5."""
    return inference_environment(tmp_path_factory.mktemp("environments"))


@pytest.fixture(scope="session")
def older(inference: Environment) -> Environment:
    """The same with transformers 4.57."""
    return overlay(inference, inference.folder.with_name("older"), *TRANSFORMERS_4)


@pytest.fixture(scope="session")
def quantizing(inference: Environment) -> Environment:
    """The same with bitsandbytes."""
    return overlay(inference, inference.folder.with_name("quantizing"), *QUANTIZATION)
