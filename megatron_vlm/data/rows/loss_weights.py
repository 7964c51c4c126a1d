"""How much each supervised token counts in the loss of a step: `training.loss_normalization`.

The loss of a step is sum(w * l) / sum(w) over all its supervised tokens, whatever rows, ranks and slices they are in.
With n supervised tokens in a token's document, w is

    token     1            every token counts the same
    sample    1 / n        every document counts the same: the mean of the documents' mean losses
    sqrt      1 / sqrt(n)  between both (the square averaging of InternVL 2.5, arXiv:2412.05271, section 3.3)
"""

from __future__ import annotations

import torch

from megatron_vlm.config.training import LossNormalization
from megatron_vlm.data.rows.batch import IGNORE_INDEX, PackedBatch

_EXPONENT: dict[LossNormalization, float] = {"token": 0.0, "sample": -1.0, "sqrt": -0.5}


def token_weights(batch: PackedBatch, normalization: LossNormalization) -> torch.Tensor:
    """[S] fp64 weights of a row's tokens; 0 where a token is not supervised."""
    supervised = batch.labels != IGNORE_INDEX
    if normalization == "token":
        return supervised.double()
    bounds = torch.tensor(batch.cu_seqlens)
    before = torch.cat([torch.zeros(1, dtype=torch.long), supervised.cumsum(0)])
    counts = before[bounds[1:]] - before[bounds[:-1]]
    weights = counts.clamp(min=1).double() ** _EXPONENT[normalization]
    return weights.repeat_interleave(bounds.diff()) * supervised
