"""The language model on Transformer Engine's linear layers, without Transformer Engine.

megatron-core wraps them (TEColumnParallelLinear, TERowParallelLinear). In their place stand megatron-core's own layers
behind the constructors of the wrappers, with an extra state as Transformer Engine has it: which layer is where, what it
is given, the keys of checkpoints. That the wrappers fit Transformer Engine is read from both sources.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401
from megatron_vlm.config import ConfigError, ParallelConfig
from tests.contracts import signatures
from tests.contracts.signatures import Published, with_signature
from tests.parallel.rows import make_row, tiny_recipe

SETTINGS = {"transformer_impl": "transformer_engine", "fp8_format": "hybrid", "bf16": True}


def _wrapper_signature(name: str) -> inspect.Signature:
    """Of a class in megatron-core's file for Transformer Engine, which cannot be imported as it is without it."""
    (node,) = [item for item in _wrappers().body if isinstance(item, ast.ClassDef) and item.name == name]
    (init,) = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    for argument in [*init.args.args, *init.args.kwonlyargs]:
        argument.annotation = None
    scope: dict[str, Any] = {}
    exec(f"def init({ast.unparse(init.args)}): ...", scope)
    return inspect.signature(scope["init"])


def _wrappers() -> ast.Module:
    import megatron.core

    path = Path(megatron.core.__path__[0], "extensions", "transformer_engine.py")
    return ast.parse(path.read_text())


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the stand-ins in; returns what happens: layers that are called in FP8's context, by class and context."""
    import sys
    from types import ModuleType

    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    import megatron_vlm.training.trainer  # noqa: F401  (all of megatron-core that looks for Transformer Engine)
    from megatron_vlm.model.layers import linear_layers

    happened: list[str] = []
    contexts = ["fp8"]  # megatron-core's block has entered it

    def stand_in(local: Any, wrapper: str) -> Any:
        signature = _wrapper_signature(wrapper)

        class StandIn(local):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                signature.bind(self, *args, **kwargs)
                known = inspect.signature(local.__init__).parameters
                super().__init__(*args, **{name: value for name, value in kwargs.items() if name in known})

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                happened.append(f"{wrapper} {contexts[-1]}")
                return super().forward(*args, **kwargs)

            scales = 0

            def get_extra_state(self) -> torch.Tensor:
                return torch.tensor([self.scales], dtype=torch.uint8)

            def set_extra_state(self, state: torch.Tensor | None) -> None:
                self.scales = int(state) if state is not None and state.numel() else 0

        return StandIn

    @contextlib.contextmanager
    def enter(arguments: dict[str, Any]) -> Iterator[None]:
        contexts.append("fp8" if arguments["enabled"] else "bf16")
        yield
        contexts.pop()

    classes = (
        stand_in(ColumnParallelLinear, "TEColumnParallelLinear"),
        stand_in(RowParallelLinear, "TERowParallelLinear"),
    )
    monkeypatch.setattr(linear_layers, "_transformer_engine_classes", lambda: classes)
    monkeypatch.setattr(linear_layers, "_import_problem", lambda: None)
    monkeypatch.setattr(linear_layers, "on_gpu", lambda: True)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    autocast = with_signature(signatures.TE_AUTOCAST[0], enter)
    sys.modules["transformer_engine.pytorch"].fp8_autocast = autocast  # type: ignore[attr-defined]
    return happened


def _built(for_training: bool = True, **training: Any) -> Any:
    from megatron_vlm.model.build import build_model
    from megatron_vlm.model.initialize import initialize_weights

    recipe = tiny_recipe(ParallelConfig(), **training)
    (model,) = chunks = build_model(recipe, for_training=for_training)
    initialize_weights(chunks, recipe)
    return model


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}


def test_fp8_is_in_qkv_fc1_and_fc2_of_the_language_model(one_process: None, events: list[str]) -> None:
    model = _built(**SETTINGS)
    model(make_row(0))
    column, row = "TEColumnParallelLinear", "TERowParallelLinear"
    layer = [f"{column} fp8", f"{row} bf16", f"{column} fp8", f"{row} fp8"]  # qkv, out, fc1, fc2
    assert events == layer * 4  # and the tower has none
    assert model.language_model.config.fp8 == "hybrid" and model.language_model.config.fp8_recipe == "delayed"
    assert model.vision_model.config.fp8 is None


def test_without_fp8_the_output_projection_is_as_the_others(one_process: None, events: list[str]) -> None:
    model = _built(transformer_impl="transformer_engine")
    model(make_row(0))
    assert {event.split()[1] for event in events} == {"fp8"} and len(events) == 16


def test_losses_and_weights_are_those_of_the_local_layers(one_process: None, events: list[str]) -> None:
    ours, reference = _built(transformer_impl="transformer_engine"), _built()
    for index in (0, 1):
        assert torch.equal(ours(make_row(index)), reference(make_row(index)))
    assert events
    state, expected = _weights(ours), _weights(reference)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_checkpoints_have_the_same_tensors(one_process: None, events: list[str]) -> None:
    from megatron_vlm.training.checkpoint.shards import model_state

    ours, reference = (model_state([_built(**training)]) for training in ({**SETTINGS, "bf16": False}, {}))
    shards = [[(s.key, s.offsets, s.global_shape) for s in state.shards] for state in (ours, reference)]
    assert sorted(shards[0]) == sorted(shards[1])
    layers = [f"{name}._extra_state" for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")]
    own = {stored.key for stored in ours.objects} - {stored.key for stored in reference.objects}
    assert all(any(name in key for name in layers) for key in own)
    # Each norm is a module of its own, under the same name: none is inside a fused layer.
    assert not any("layer_norm_weight" in key for key, *_ in shards[0])


def test_a_checkpoint_of_one_loads_into_the_other(one_process: None, events: list[str], tmp_path: Path) -> None:
    from megatron_vlm.model.build import build_model
    from megatron_vlm.training.checkpoint import Progress, load_checkpoint, require_checkpoint, save_checkpoint

    kinds: list[dict[str, Any]] = [{"transformer_impl": "transformer_engine"}, {}]
    for number, (saved_as, loaded_as) in enumerate([kinds, kinds[::-1]]):
        folder = tmp_path / str(number)
        model = _built(**saved_as, save=str(folder))
        recipe = tiny_recipe(ParallelConfig(), **saved_as, save=str(folder))
        save_checkpoint([model], recipe, Progress(iteration=1))
        other = tiny_recipe(ParallelConfig(), **loaded_as)
        (loaded,) = build_model(other, for_training=True)
        load_checkpoint(require_checkpoint(folder), [loaded], other)
        for name, value in _weights(model).items():
            assert torch.equal(_weights(loaded)[name], value), name


def test_scales_of_fp8_come_with_a_checkpoint(one_process: None, events: list[str], tmp_path: Path) -> None:
    from megatron_vlm.model.build import build_model
    from megatron_vlm.training.checkpoint import Progress, load_checkpoint, require_checkpoint, save_checkpoint

    recipe = tiny_recipe(ParallelConfig(), transformer_impl="transformer_engine", save=str(tmp_path))

    def layers(model: Any) -> list[Any]:
        return [module for module in model.modules() if hasattr(module, "scales")]

    model = _built(transformer_impl="transformer_engine", save=str(tmp_path))
    for number, layer in enumerate(layers(model), 1):
        layer.scales = number
    save_checkpoint([model], recipe, Progress(iteration=1))
    (loaded,) = build_model(recipe, for_training=True)
    load_checkpoint(require_checkpoint(tmp_path), [loaded], recipe)
    assert [layer.scales for layer in layers(loaded)] == list(range(1, 17))


def test_where_it_cannot_run_training_says_so_and_everything_else_works(one_process: None) -> None:
    """Conversion, evaluation and generation take a checkpoint of any machine."""
    with pytest.raises(ConfigError, match="transformer_impl = transformer_engine: needs a GPU. Install"):
        _built(transformer_impl="transformer_engine")
    with pytest.raises(ConfigError, match="training.attention_backend = flash_attn_3: needs a GPU"):
        _built(attention_backend="flash_attn_3")
    _built(for_training=False, attention_backend="flash_attn_3", transformer_impl="transformer_engine")


def test_an_installation_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.model.layers import linear_layers

    monkeypatch.setattr(linear_layers, "on_gpu", lambda: True)
    linear_layers._import_problem.cache_clear()
    with pytest.raises(ConfigError, match="No module named 'transformer_engine'"):
        linear_layers.linear_layers(tiny_recipe(ParallelConfig(), transformer_impl="transformer_engine"))


@pytest.mark.parametrize("published", signatures.TE_LINEAR, ids=lambda item: item.version)
def test_the_wrappers_arguments_exist_in_transformer_engine(published: Published) -> None:
    """What the installed megatron-core passes to te.pytorch.Linear."""
    (wrapper,) = [item for item in _wrappers().body if isinstance(item, ast.ClassDef) and item.name == "TELinear"]
    calls = [
        node
        for node in ast.walk(wrapper)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__" and node.keywords
    ]
    assert calls
    passed = {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}
    passed |= {
        node.slice.value
        for node in ast.walk(wrapper)
        if isinstance(node, ast.Subscript)
        and ast.unparse(node.value) == "extra_kwargs"
        and isinstance(node.slice, ast.Constant)
    }
    older = {"ub_split_ag", "ub_atomic_gemm_ag", "ub_split_rs", "ub_atomic_gemm_rs"}  # before 1.5
    known = inspect.signature(with_signature(published, lambda arguments: arguments)).parameters
    assert passed - older <= known.keys()
