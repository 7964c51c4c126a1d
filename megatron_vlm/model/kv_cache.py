"""Keys and values of what was read and written so far, while text is generated."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_vlm.model.attention_kernels import attend
from megatron_vlm.model.packed_sequence import PackedSequence


class KVCache:
    """One growing sequence per prompt, for every layer; PackedSequence.cache is one of these while text is generated.

    First a row of whole prompts is read, then rows of one token per prompt follow. After each row, `advance` says that
    every layer has seen it.
    """

    def __init__(self, prompt_lengths: list[int], new_tokens: int) -> None:
        self.prompt_lengths = prompt_lengths
        self.capacity = max(prompt_lengths) + new_tokens
        self.lengths: torch.Tensor | None = None
        """[n] int64: tokens kept of each prompt; None before the prompts are read."""
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedSequence
    ) -> torch.Tensor:
        """Keep key and value [s, kv, d] of a layer; answer query [s, h, d] with all that is kept: [s, h, d]."""
        if self.lengths is None:
            self._layers[layer] = self._empty(key), self._empty(value)
            rows = torch.repeat_interleave(torch.arange(len(self.prompt_lengths)), torch.tensor(self.prompt_lengths))
            places = torch.cat([torch.arange(length) for length in self.prompt_lengths])
            for kept, new in zip(self._layers[layer], (key, value), strict=True):
                kept[rows, places] = new
            return attend(query, key, value, layout)
        keys, values = self._layers[layer]
        rows = torch.arange(len(self.lengths), device=self.lengths.device)
        keys[rows, self.lengths], values[rows, self.lengths] = key, value
        longest = int(self.lengths.max()) + 1
        seen = torch.arange(longest, device=self.lengths.device) <= self.lengths[:, None]
        out = F.scaled_dot_product_attention(
            query[:, :, None],
            keys[:, :longest].transpose(1, 2),
            values[:, :longest].transpose(1, 2),
            attn_mask=seen[:, None, None],
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out[:, :, 0]

    def advance(self, device: torch.device) -> None:
        """The row is through all layers: the next one stands behind it."""
        if self.lengths is None:
            self.lengths = torch.tensor(self.prompt_lengths, device=device)
        else:
            self.lengths = self.lengths + 1

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(len(self.prompt_lengths), self.capacity, *like.shape[1:])
