"""Norms of the vision tower and the language model, with the constructor that megatron-core's layer specs expect."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.runtime.device import fused


class LayerNormWithoutAffine(torch.nn.Module):
    """OLMo-1's layer norm: no weight, no bias, computed in fp32 like transformers' OlmoLayerNorm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _layer_norm(hidden, self.eps)


@fused
def _layer_norm(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(hidden.float(), hidden.shape[-1:], eps=eps).to(hidden.dtype)


class LayerNorm(torch.nn.Module):
    """A layer norm with weight and bias that works under sequence parallelism, which megatron-core's wrapper rejects.

    Under sequence parallelism each tensor rank normalises different tokens. The attribute `sequence_parallel` makes
    megatron-core sum the parameters' gradients over the tensor group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden, self.shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.Module):
    """RMSNorm (arXiv:1910.07467), computed in fp32 like transformers' Llama, Qwen2 and Mistral.

    `sequence_parallel` has the same meaning as in LayerNorm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _rms_norm(hidden, self.weight, self.eps)


@fused
def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = hidden.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(hidden.dtype)


LANGUAGE_NORMS: dict[str, type[torch.nn.Module]] = {"LayerNorm": LayerNormWithoutAffine, "RMSNorm": RMSNorm}
"""The norm for each value of `model.language.normalization`."""
