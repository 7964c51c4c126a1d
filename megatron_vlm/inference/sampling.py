"""Sampling of the next token."""

from __future__ import annotations

import torch


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Greedy decoding, logits [n, V] -> ids [n]; the lowest id if several are equally likely, as in transformers."""
    return logits.argmax(dim=-1)
