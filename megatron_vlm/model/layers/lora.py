"""LoRA adapters (arXiv:2106.09685) beside megatron-core's linear layers, with the tensors that peft has.

q, k and v are one layer of megatron-core, and so are gate and up. Each still has its own A and B, as in peft, so that
an adapter is exported by renaming.

With n tokens in a context rank's slice of the row, r the rank of the adapters and m modules in the layer:

    column-parallel   x [n / tp, in] -A-> [n / tp, m r] -all-gather-> [n, m r] -B-> [n, out / tp]
    row-parallel      x [n, in / tp] -A-> [n, r] -reduce-scatter-> [n / tp, r] -B-> [n / tp, out]

Only r numbers of a token are communicated. The A of the former and the B of the latter are the same on all tensor
ranks, and each rank computes their gradients from its own tokens: `sequence_parallel` makes megatron-core sum them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_vlm.config import Recipe
from megatron_vlm.config.lora import FUSED_LAYERS, lora_sizes, uses_lora
from megatron_vlm.config.training import LoraModule

_ATTRIBUTE = "lora"


@dataclass(frozen=True)
class LayerAdapters:
    """The adapters of one of megatron-core's linear layers."""

    modules: tuple[LoraModule, ...]
    """All modules of the layer, in the order of its output."""
    sizes: Mapping[LoraModule, tuple[int, int]]
    """(in, out) of the modules that have an adapter."""
    outputs: Mapping[LoraModule, int]
    """Rows of the output of each module."""
    groups: int
    """The output consists of so many groups, each with its share of every module's rows."""
    rank: int
    scaling: float
    """alpha / r."""


def layer_adapters(recipe: Recipe, layer: str) -> LayerAdapters | None:
    """The adapters of `layer`, one of FUSED_LAYERS; None if it has none."""
    language, training = recipe.model.language, recipe.training
    modules, sizes = FUSED_LAYERS[layer], lora_sizes(language)
    chosen = {module: sizes[module] for module in modules if module in training.lora_target_modules}
    if not uses_lora(training) or not chosen:
        return None
    return LayerAdapters(
        modules=modules,
        sizes=chosen,
        outputs={module: sizes[module][1] for module in modules},
        # The query heads, the key and the value head of a query group; each tensor rank's share of gate and up.
        groups=language.num_key_value_heads if layer == "linear_qkv" else recipe.parallel.tensor_model_parallel_size,
        rank=training.lora_r,
        scaling=training.lora_alpha / training.lora_r,
    )


class Adapter(torch.nn.Module):
    """A [r, in] and B [out, r] of one module, or this tensor rank's shards of them."""

    def __init__(self, inputs: int, outputs: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(torch.empty(rank, inputs, dtype=dtype))
        self.B = torch.nn.Parameter(torch.empty(outputs, rank, dtype=dtype))


class _Adapters(torch.nn.Module):
    """The adapters of one linear layer, each a submodule with the module's name."""

    sharded: Mapping[str, int]
    """"A" or "B" -> the axis that tensor ranks share; the other one is the same on all of them."""

    def __init__(self, config: TransformerConfig, layer: LayerAdapters, sharded: Mapping[str, int]) -> None:
        super().__init__()
        self.layer, self.sharded, self.sequence_parallel = layer, sharded, config.sequence_parallel
        self.tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
        in_shards, out_shards = (self.tensor_ranks if name in sharded else 1 for name in ("A", "B"))
        for module, (inputs, outputs) in layer.sizes.items():
            adapter = Adapter(inputs // in_shards, outputs // out_shards, layer.rank, config.params_dtype)
            self.add_module(module, adapter)
            for name, parameter in adapter.named_parameters():
                if name in sharded:
                    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=sharded[name], stride=1)
                else:
                    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def _of(self, module: str) -> Adapter:
        adapter = self.get_submodule(module)
        assert isinstance(adapter, Adapter)
        return adapter

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> ShardedStateDict:
        """As those of megatron-core's modules."""
        axes = {f"{module}.{name}": axis for module in self.layer.sizes for name, axis in self.sharded.items()}
        state: ShardedStateDict = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state


class ColumnAdapters(_Adapters):
    """Of a column-parallel layer: A on all tensor ranks, B sharded as the layer's output is.

    Where tensor ranks outnumber key/value heads, a rank's share of the output lies inside a query group. Then B is on
    all tensor ranks too, and each computes with the rows of its share.
    """

    def __init__(self, config: TransformerConfig, layer: LayerAdapters) -> None:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        even = layer.groups % ranks == 0
        super().__init__(config, layer, {"B": 0} if even else {})
        self.groups = layer.groups // ranks if even else 1
        per_group = {module: layer.outputs[module] // layer.groups for module in layer.modules}
        self.rows = (
            {module: slice(0, self.groups * rows) for module, rows in per_group.items()}
            if even
            else _rows_of_share(per_group, layer.groups, parallel_state.get_tensor_model_parallel_rank(), ranks)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n / tp, 1, in] -> [n, 1, out / tp]."""
        hidden = F.linear(inputs, torch.cat([self._of(module).A for module in self.layer.sizes]))
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        hidden = hidden * self.layer.scaling
        of_module = dict(zip(self.layer.sizes, hidden.split(self.layer.rank, dim=-1), strict=True))
        outputs = [self._output(of_module.get(module), module, hidden) for module in self.layer.modules]
        return torch.cat(outputs, dim=-1).flatten(-2)

    def _output(self, hidden: torch.Tensor | None, module: LoraModule, like: torch.Tensor) -> torch.Tensor:
        """[n, 1, r] -> [n, 1, groups, rows of the module in each]; zeros for a module without an adapter."""
        rows = self.rows[module]
        shape = (self.groups, (rows.stop - rows.start) // self.groups)
        if hidden is None:
            return like.new_zeros(*like.shape[:-1], *shape)
        return F.linear(hidden, self._of(module).B[rows]).unflatten(-1, shape)


def _rows_of_share(per_group: Mapping[LoraModule, int], groups: int, rank: int, ranks: int) -> dict[LoraModule, slice]:
    """Rows of each module in a tensor rank's share, which is a slice of one query group's query, key and value rows."""
    width = sum(per_group.values()) * groups // ranks
    group, start = divmod(rank * width, sum(per_group.values()))
    found, begin = {}, 0
    for module, rows in per_group.items():
        first, last = (min(max(at - begin, 0), rows) for at in (start, start + width))
        found[module] = slice(group * rows + first, group * rows + last)
        begin += rows
    return found


class RowAdapters(_Adapters):
    """Of a row-parallel layer: A sharded as the layer's input is, B on all tensor ranks."""

    def __init__(self, config: TransformerConfig, layer: LayerAdapters) -> None:
        super().__init__(config, layer, {"A": 1})
        (self.module,) = layer.sizes

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, 1, in / tp] -> [n / tp, 1, out]."""
        adapter = self._of(self.module)
        hidden = F.linear(inputs, adapter.A)
        if self.sequence_parallel:
            hidden = tensor_parallel.reduce_scatter_to_sequence_parallel_region(hidden)
        return F.linear(hidden * self.layer.scaling, adapter.B)


def with_adapters(linear: Any, adapters: Callable[..., torch.nn.Module], layer: LayerAdapters) -> Any:
    """A class of linear layers like `linear`, with adapters in the attribute `lora`."""

    class LoraLinear(linear):  # type: ignore[misc]
        def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
            super().__init__(*args, config=config, **kwargs)
            setattr(self, _ATTRIBUTE, adapters(config, layer))

        def forward(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            output, bias = super().forward(inputs, *args, **kwargs)
            return output + self.lora(inputs), bias

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
        ) -> ShardedStateDict:
            state: ShardedStateDict = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            # megatron-core takes every tensor that it does not know for one that all tensor ranks have.
            own = self.lora.sharded_state_dict(f"{prefix}{_ATTRIBUTE}.", sharded_offsets, metadata)
            return {**state, **own}

    return LoraLinear


def is_adapter(name: str) -> bool:
    """Whether a parameter or a tensor of a checkpoint belongs to an adapter."""
    return f".{_ATTRIBUTE}." in name


def adapter_parameters(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The parameters of all adapters in `model`."""
    return (parameter for name, parameter in model.named_parameters() if is_adapter(name))


def require_input_gradient(hidden: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Let recomputed layers reach their adapters where nothing before them is trained.

    A recomputed layer has a backward pass only if its input needs a gradient; its parameters do not count.
    """
    training = recipe.training
    if uses_lora(training) and training.recompute_granularity and torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_()
    return hidden
