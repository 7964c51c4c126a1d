"""The fast transformers loop has the plain one's loss and gradients, and calls Liger as its published source has it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.olmo import modeling_olmo

from benchmarks.loss_head import plain
from benchmarks.support import transformers_flash, transformers_loop
from benchmarks.support.instruct_samples import InstructRows
from benchmarks.support.samples import Sample
from megatron_vlm.config import Recipe
from megatron_vlm.config.recipe import load_recipe
from tests.benchmarks.small_recipe import write_small_recipe
from tests.contracts import signatures
from tests.contracts.signatures import with_signature

CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    grids = [[28, 56], [56, 28], [56, 56]]
    return load_recipe(write_small_recipe(tmp_path / "recipe.yaml", seq_length=2048, max_tiles=20, grids=grids))


@pytest.fixture
def samples(recipe: Recipe) -> list[Sample]:
    return InstructRows(recipe.model, recipe.data.seq_length, recipe.data.max_tiles_per_row).samples(0)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Liger with its published signatures and torch's arithmetic. Returns what was called, in order."""
    called: list[str] = []
    init, forward = (with_signature(published, lambda arguments: arguments) for published in signatures.LIGER_LOSS)
    rotary = modeling_olmo.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_olmo, "apply_rotary_pos_emb", rotary)  # so that it is put back

    class Loss:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            assert init(self, *args, **kwargs)["reduction"] == "sum"

        def __call__(self, *args: Any) -> torch.Tensor:
            called.append("loss")
            a = forward(self, *args)
            return plain(a["_input"], a["lin_weight"], a["target"])

    def rope(a: dict[str, Any]) -> Any:
        called.append("rope")
        return rotary(a["q"], a["k"], a["cos"], a["sin"], a["unsqueeze_dim"])

    def swiglu(a: dict[str, Any]) -> torch.Tensor:
        called.append("swiglu")
        mlp, x = a["self"], a["x"]
        out: torch.Tensor = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
        return out

    module: Any = ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = Loss
    module.liger_rotary_pos_emb = with_signature(signatures.LIGER_ROPE, rope)
    module.LigerSwiGLUMLP = type("LigerSwiGLUMLP", (), {"forward": with_signature(signatures.LIGER_SWIGLU, swiglu)})
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    return called


def _gradients(loop: transformers_loop.Loop, batches: list[transformers_loop.Batch]) -> tuple[float, torch.Tensor]:
    loss = loop.forward_backward(batches)
    used = [p.grad.flatten() for p in loop.model.parameters() if p.grad is not None]
    gradients = torch.cat(used)
    loop.optimizer.zero_grad()
    return loss, gradients


@pytest.mark.parametrize("size", [3, 100])
def test_flattened_samples_have_the_loss_and_gradients_of_padded_ones(
    recipe: Recipe, samples: list[Sample], liger: list[str], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    torch.manual_seed(0)
    model = transformers_loop.build(recipe)
    padded = transformers_loop.micro_batches(samples, size, CPU)
    loss, gradients = _gradients(transformers_loop.Loop(model, recipe), padded)
    assert not liger

    asked: list[str] = []
    monkeypatch.setattr(model, "set_attn_implementation", asked.append, raising=False)
    monkeypatch.setattr(transformers_flash, "is_flash_attn_2_available", lambda: True)
    loop = transformers_flash.FlashLoop(model, recipe)
    batches = transformers_loop.micro_batches(samples, size, CPU, transformers_flash.flatten)
    assert asked == ["flash_attention_2"] and len(batches) == len(padded)
    fast_loss, fast_gradients = _gradients(loop, batches)
    assert fast_loss == pytest.approx(loss, rel=1e-6)
    assert float((fast_gradients - gradients).norm() / gradients.norm()) < 1e-5
    assert liger == ["rope", "swiglu", "loss"] * len(batches)


def test_flash_attention_gets_the_documents(samples: list[Sample]) -> None:
    batch = transformers_flash.flatten(samples, CPU)
    lengths = [len(sample) for sample in samples]
    assert batch["cu_seq_lens_q"].diff().tolist() == lengths and batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
    assert batch["position_ids"].max() == max(lengths) - 1 and (batch["position_ids"] == 0).sum() == len(lengths)
    assert transformers_loop.padded_tokens([batch]) == sum(lengths)


def test_the_newest_flash_attention_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert transformers_flash.attention_implementation() is None
    for version in (2, 3):
        monkeypatch.setattr(transformers_flash, f"is_flash_attn_{version}_available", lambda: True)
        assert transformers_flash.attention_implementation() == f"flash_attention_{version}"


def test_it_says_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_flash, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert transformers_flash.why_not() == "liger-kernel not installed for a GPU"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert transformers_flash.why_not() is None
