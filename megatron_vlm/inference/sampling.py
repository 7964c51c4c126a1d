"""How the next token is chosen."""

from __future__ import annotations

import torch


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token: logits [n, V] -> ids [n]. Of equals the first, as in transformers."""
    return logits.argmax(dim=-1)
