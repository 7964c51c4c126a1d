"""What the serving benchmark compares with: transformers' `generate`; and the files that servers need."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.serving_clients import Run
from checkpoint_convert.huggingface.llava_next import write_configs
from megatron_vlm.config import ModelConfig
from megatron_vlm.data.processing.tokenizer import Tokenizer
from megatron_vlm.data.processing.tokenizer_training import save_tokenizer

NUM_SPECIAL = 3
"""Special tokens at the end of the vocabulary: end of sequence, padding, image."""


@torch.no_grad()
def generate_one_by_one(model: Any, prompts: Sequence[list[int]], new_tokens: int) -> Run:
    """transformers' `generate` for one prompt after the other."""
    first, tokens, started = [], [], time.perf_counter()
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        begun = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        first.append(time.perf_counter() - begun)
        started += first[-1]  # the first token was timed apart, and is generated again
        done = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        tokens.append(done[0, len(prompt) :].tolist())
    seconds = time.perf_counter() - started
    return Run(len(prompts) * new_tokens / seconds, first, tokens, sum(first) / seconds)


def write_word_tokenizer(folder: Path, vocab_size: int) -> None:
    """Token n is the word `wn`, so that token ids can be sent as text. The last three ids are special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    eos, pad = "<eos>", "<pad>"
    words = [*(f"w{number}" for number in range(vocab_size - NUM_SPECIAL)), eos, pad]  # `<image>` is not in the file
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=pad))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save_tokenizer(tokenizer, folder, eos=eos, pad=pad)


def write_model(theirs: Any, model: ModelConfig, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Write the transformers model `theirs` with its processor into the new `folder`."""
    folder.mkdir()
    write_configs(folder, model, tokenizer, dtype)
    theirs.save_pretrained(folder)  # with its own configs
