"""The two-layer MLP from the vision tower's width to the language model's (LLaVA-1.5, arXiv:2310.03744)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class Projector(MegatronModule):
    """Linear, exact GELU, Linear, with biases; [..., vision width] -> [..., language width].

    It is replicated on every tensor rank and each rank runs it on its own tiles, so its gradients are summed over the
    tensor group (`sequence_parallel`).
    """

    def __init__(self, config: TransformerConfig, vision_width: int) -> None:
        super().__init__(config=config)
        width, dtype = config.hidden_size, config.params_dtype
        self.linear_1 = torch.nn.Linear(vision_width, width, dtype=dtype)
        self.linear_2 = torch.nn.Linear(width, width, dtype=dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))
