"""The norms of the two towers, in the calling convention of megatron-core's layer specs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.runtime.device import fused


class LayerNormWithoutAffine(torch.nn.Module):
    """OLMo-1's norm: no weight, no bias, computed in fp32 (as transformers' OlmoLayerNorm)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _layer_norm(hidden, self.eps)


@fused
def _layer_norm(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(hidden.float(), hidden.shape[-1:], eps=eps).to(hidden.dtype)


class LayerNorm(torch.nn.Module):
    """A layer norm with weight and bias that may run on a sequence-parallel slice.

    megatron-core's own wrapper of torch's norm refuses sequence parallelism. Under it each tensor rank normalises other
    tokens, so that the parameters' gradients are summed over the tensor group: `sequence_parallel` says so.
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
    """A weight and no mean (arXiv:1910.07467), in fp32 as transformers' Llama, Qwen2 and Mistral compute it.

    As for LayerNorm, `sequence_parallel` says that tensor ranks see other tokens.
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
"""What `model.language.normalization` means."""
