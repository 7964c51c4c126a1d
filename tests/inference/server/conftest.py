"""One tiny model, and one server in this process, for all tests of the folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vlm.inference.load import load_engine
from tests.inference.server.running import CONFIG, RunningServer, run_server
from tests.inference.tiny_model import write_tiny_model


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder in source/, and the same model in megatron/."""
    folder = tmp_path_factory.mktemp("server")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="package")
def server(folder: Path) -> Iterator[RunningServer]:
    with load_engine(folder / "megatron", CONFIG) as engine:
        assert engine is not None
        with run_server(engine) as server:
            yield server
            stats = engine.stats()
            assert stats.running == stats.waiting == 0
            assert stats.free_blocks == stats.total_blocks
