"""Which attention backend is chosen on which machine, and what an impossible choice is answered with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401
from megatron_vlm.config import ConfigError, Recipe
from megatron_vlm.model.layers import attention_backend as backends
from megatron_vlm.model.layers.attention_backend import choose_attention, describe_attention

PACKAGES = {"flash_attn_2", "flash_attn_3", "transformer_engine", "aiter"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that this is a GPU machine with some packages, and with torch 2.11 or older."""

    def pretend(kind: str, *packages: str, varlen: bool = True, capability: tuple[int, int] = (9, 0)) -> None:
        assert set(packages) <= PACKAGES
        monkeypatch.setattr(backends, "device_kind", lambda: kind)
        monkeypatch.setattr(backends, "on_gpu", lambda: kind != "cpu")
        monkeypatch.setattr(backends, "compute_capability", lambda: capability)
        problem = "cannot be imported (ImportError: no such module). Install it"
        missing = PACKAGES - set(packages)
        monkeypatch.setattr(backends, "_import_problem", lambda backend: problem if backend in missing else None)
        parameters = frozenset({"window_size"} if varlen else set())
        monkeypatch.setattr(backends.kernels, "torch_varlen_parameters", lambda: parameters)

    return pretend


def recipe_with(**training: Any) -> Recipe:
    recipe = Recipe()
    for name, value in {"bf16": True, **training}.items():
        setattr(recipe.training, name, value)
    return recipe


CASES = [
    (("cuda",), "torch_varlen", "torch_varlen"),
    # Measured: faster on packed rows, slower on tiles.
    (("cuda", "transformer_engine"), "transformer_engine", "torch_varlen"),
    (("cuda", "flash_attn_2"), "torch_varlen", "torch_varlen"),
    # Measured: faster on both.
    (("cuda", "transformer_engine", "flash_attn_3"), "flash_attn_3", "flash_attn_3"),
    (("rocm",), "torch_varlen", "torch_varlen"),
    (("rocm", "flash_attn_2", "aiter", "transformer_engine"), "flash_attn_2", "flash_attn_2"),
    (("cpu", "transformer_engine"), "sdpa", "sdpa"),
]


@pytest.mark.parametrize(("where", "language", "vision"), CASES, ids=["+".join(case[0]) for case in CASES])
def test_auto(machine: Any, where: tuple[str, ...], language: str, vision: str) -> None:
    machine(*where)
    recipe = recipe_with()
    assert choose_attention(recipe, "language").backend == language
    assert choose_attention(recipe, "vision").backend == vision
    assert choose_attention(recipe, "language").reads_groups == (language == "sdpa")


def test_auto_with_an_older_torch(machine: Any) -> None:
    machine("cuda", "flash_attn_2", varlen=False)
    assert choose_attention(recipe_with(), "vision").backend == "flash_attn_2"
    machine("rocm", varlen=False)
    assert choose_attention(recipe_with(), "vision").backend == "sdpa"


def test_auto_without_half_precision_or_with_odd_heads(machine: Any) -> None:
    machine("cuda", *PACKAGES)
    assert choose_attention(recipe_with(bf16=False), "language").backend == "sdpa"
    recipe = recipe_with()
    recipe.model.language.head_dim = 12
    assert choose_attention(recipe, "language").backend == "sdpa"
    assert choose_attention(recipe, "vision").backend == "flash_attn_3"


def test_each_part_may_have_its_own(machine: Any) -> None:
    machine("cuda", *PACKAGES)
    recipe = recipe_with(attention_backend="flash_attn_3", vision_attention_backend="sdpa")
    assert choose_attention(recipe, "language").backend == "flash_attn_3"
    assert choose_attention(recipe, "vision").backend == "sdpa"
    recipe.training.vision_attention_backend = None
    assert choose_attention(recipe, "vision").backend == "flash_attn_3"


IMPOSSIBLE = [
    (("cuda",), {"attention_backend": "flash_attn_2"}, "Install"),
    (("cuda",), {"attention_backend": "aiter"}, "AMD GPUs"),
    (("rocm", "transformer_engine"), {"attention_backend": "transformer_engine"}, "aborts on AMD"),
    (("rocm", "flash_attn_3"), {"attention_backend": "flash_attn_3"}, "NVIDIA"),
    (("cuda", "flash_attn_2"), {"attention_backend": "flash_attn_2", "bf16": False}, "bf16 = true"),
    (("cpu",), {"attention_backend": "torch_varlen"}, "needs a GPU"),
    (("cuda",), {"vision_attention_backend": "flash_attn_2"}, "training.vision_attention_backend = flash_attn_2"),
]


@pytest.mark.parametrize(("where", "settings", "message"), IMPOSSIBLE)
def test_an_impossible_choice_is_an_error(
    machine: Any, where: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    machine(*where)
    with pytest.raises(ConfigError, match=message):
        choose_attention(recipe_with(**settings), "vision")


def test_limits_of_the_gpu_and_of_torch(machine: Any) -> None:
    machine("cuda", "flash_attn_3", capability=(8, 0), varlen=False)
    for name, message in [("flash_attn_3", "this GPU has 8.0"), ("torch_varlen", "needs torch 2.11")]:
        with pytest.raises(ConfigError, match=message):
            choose_attention(recipe_with(attention_backend=name), "language")


def test_a_package_that_cannot_be_imported_says_why() -> None:
    backends._import_problem.cache_clear()
    problem = backends._import_problem("aiter")
    assert problem is not None and "No module named 'aiter'" in problem and "AMD's training image" in problem


def test_the_line_at_the_start_says_where_a_number_was_measured(machine: Any) -> None:
    machine("cuda", "transformer_engine")
    line = describe_attention(recipe_with())
    assert line.startswith("attention: vision torch_varlen (138 TFLOP/s on one NVIDIA H200")
    assert "language transformer_engine (379 TFLOP/s on" in line
    machine("cuda", "transformer_engine", "flash_attn_3")
    line = describe_attention(recipe_with())
    assert "vision flash_attn_3 (232 TFLOP/s on" in line and "language flash_attn_3 (498 TFLOP/s on" in line
    machine("rocm")
    assert "not measured" in describe_attention(recipe_with())


def test_the_model_uses_what_was_chosen(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that the loader makes have groups only if the chosen kernel reads them."""
    from megatron_vlm.config import ParallelConfig
    from megatron_vlm.model.build import build_model
    from tests.parallel.rows import tiny_recipe

    fake = backends.Attention("torch_varlen", "for the test")
    choose = backends.choose_attention
    for module in ("vlm", "rank_view"):
        monkeypatch.setattr(
            f"megatron_vlm.model.{module}.choose_attention",
            lambda recipe, part: fake if part == "language" else choose(recipe, part),
        )
    (model,) = build_model(tiny_recipe(ParallelConfig()), torch.device("meta"))
    assert (model.view.groups_documents, model.view.groups_tiles) == (False, True)
    of_language = model.language_model.decoder.layers[0].self_attention.core_attention.kernel
    of_vision = model.vision_model.decoder.layers[0].self_attention.core_attention.kernel
    assert (of_language.__name__, of_vision.__name__) == ("torch_varlen", "sdpa")
