"""Process groups of a process whose library has set up torch.distributed already, as accelerate does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_vlm.config import ParallelConfig
from megatron_vlm.runtime.launch import distributed

# isort: split
from megatron.core import parallel_state


def test_a_world_that_is_there_stays(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        world = dist.group.WORLD
        for _ in range(2):
            with distributed(ParallelConfig()):
                assert parallel_state.get_tensor_model_parallel_world_size() == 1
            assert dist.group.WORLD is world
            assert not parallel_state.model_parallel_is_initialized()
        with pytest.raises(ValueError, match="of the caller"), distributed(ParallelConfig()):
            raise ValueError("of the caller")
        assert dist.group.WORLD is world
        assert not parallel_state.model_parallel_is_initialized()
    finally:
        dist.destroy_process_group()


def test_a_world_of_our_own_ends() -> None:
    with distributed(ParallelConfig()):
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()
