"""Initial weights do not depend on the number of threads that sample them, nor on their order."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from megatron_vlm.config import ParallelConfig
from tests.parallel.rows import tiny_recipe


def _weights(monkeypatch: pytest.MonkeyPatch, cores: int) -> dict[str, torch.Tensor]:
    from megatron_vlm.model import initialize
    from megatron_vlm.model.build import build_model

    monkeypatch.setattr(initialize, "cores_per_rank", lambda: cores)
    recipe = tiny_recipe(ParallelConfig())
    chunks = build_model(recipe)
    for parameter in chunks[0].parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    initialize.initialize_weights(chunks, recipe)
    return {name: parameter.detach() for name, parameter in chunks[0].named_parameters()}


def test_threads_sample_the_same_weights(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, together = _weights(monkeypatch, 1), _weights(monkeypatch, 5)
    assert alone.keys() == together.keys() and len(alone) > 20
    for name, weight in alone.items():
        assert torch.isfinite(weight).all() and torch.equal(weight, together[name]), name


def test_a_weight_is_that_of_its_name_seed_and_layer() -> None:
    """Written out, so that runs of one seed start alike in later versions, too."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_vlm.model.initialize import initial_value

    recipe, key = tiny_recipe(ParallelConfig()), "language_model.decoder.layers.mlp.linear_fc2.weight"
    offsets: Any = (3, 0, 5)
    tensor = ShardedTensor(
        key, torch.empty(40, 5), torch.float32, (40, 5), (4, 40, 10), offsets, (4, 1, 2), prepend_axis_num=1
    )
    digest = hashlib.sha256(f"{recipe.training.seed}/{key}/(3,)".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    layers = recipe.model.language.num_hidden_layers
    whole = torch.randn(40, 10, generator=generator) * 10**-0.5 * (2 * layers) ** -0.5
    assert torch.equal(initial_value(tensor, recipe), whole[:, 5:])


def test_an_error_in_a_thread_is_raised(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.model import initialize

    monkeypatch.setattr(initialize, "_RULES", initialize._RULES[:-1])
    with pytest.raises(KeyError, match="no rule initialises .*weight: add one to _RULES"):
        _weights(monkeypatch, 2)


def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.runtime.launch import cores_per_rank

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores_per_rank() == 16
    for ranks, cores in (("8", 2), ("32", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert cores_per_rank() == cores
