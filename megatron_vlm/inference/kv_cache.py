"""Key/value cache of the language model during generation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_vlm.model.attention_kernels import attend
from megatron_vlm.model.packed_sequence import PackedSequence


class KVCache:
    """Keys and values of every layer, one growing sequence per prompt; PackedSequence.cache refers to it.

    The first row holds the whole prompts (prefill), each later row one token per prompt. Call `advance` after each row.
    """

    def __init__(self, prompt_lengths: list[int], new_tokens: int) -> None:
        """`new_tokens` is the maximum number of tokens generated per prompt."""
        self.prompt_lengths = prompt_lengths
        self.capacity = max(prompt_lengths) + new_tokens
        self.lengths: torch.Tensor | None = None
        """[n] int64: cached tokens per prompt; None before prefill."""
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequence
    ) -> torch.Tensor:
        """Append key and value [s, kv, d] of a layer, then attend query [s, h, d] to all cached tokens: [s, h, d]."""
        if self.lengths is None:
            self._layers[layer] = self._empty(key), self._empty(value)
            rows = torch.repeat_interleave(torch.arange(len(self.prompt_lengths)), torch.tensor(self.prompt_lengths))
            positions = torch.cat([torch.arange(length) for length in self.prompt_lengths])
            for cached, new in zip(self._layers[layer], (key, value), strict=True):
                cached[rows, positions] = new
            return attend(query, key, value, packed)
        keys, values = self._layers[layer]
        rows = torch.arange(len(self.lengths), device=self.lengths.device)
        keys[rows, self.lengths], values[rows, self.lengths] = key, value
        longest = int(self.lengths.max()) + 1
        visible = torch.arange(longest, device=self.lengths.device) <= self.lengths[:, None]
        out = F.scaled_dot_product_attention(
            query[:, :, None],
            keys[:, :longest].transpose(1, 2),
            values[:, :longest].transpose(1, 2),
            attn_mask=visible[:, None, None],
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out[:, :, 0]

    def advance(self, device: torch.device) -> None:
        """Call when all layers have processed a row: the next row's tokens follow it."""
        if self.lengths is None:
            self.lengths = torch.tensor(self.prompt_lengths, device=device)
        else:
            self.lengths = self.lengths + 1

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(len(self.prompt_lengths), self.capacity, *like.shape[1:])
