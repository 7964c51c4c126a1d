"""The transformers loop as its users make it fast: flash-attn, Liger's kernels, and samples without padding.

Samples are flattened into one sequence with position ids that begin again at each of them, as transformers'
DataCollatorWithFlattening does. Liger has no patch for LlavaNext or OLMo-1. So its kernels are put where its patch for
OLMo-2 puts them: rotary embedding, SwiGLU and the loss. It has none for OLMo-1's norm without weights and for CLIP.
"""

from __future__ import annotations

import importlib.util
from itertools import accumulate
from types import MethodType

import torch
import torch.nn.functional as F
from transformers import LlavaNextForConditionalGeneration
from transformers.models.olmo import modeling_olmo
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from benchmarks.support.samples import Sample
from benchmarks.support.transformers_loop import Batch, Loop, images_of
from megatron_vlm.config import Recipe
from megatron_vlm.data.rows.batch import IGNORE_INDEX


def attention_implementation() -> str | None:
    """transformers' name of the newest FlashAttention that is installed."""
    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else None


def why_not() -> str | None:
    """Why this loop cannot run here; None if it can."""
    found = {"flash-attn": attention_implementation(), "liger-kernel": importlib.util.find_spec("liger_kernel")}
    absent = [package for package, is_there in found.items() if not is_there]
    return f"{' and '.join(absent)} not installed for a GPU" if absent else None


def flatten(samples: list[Sample], device: torch.device) -> Batch:
    """One sequence of all samples; the first token of a sample is no label of the one before."""
    ids = torch.cat([torch.from_numpy(sample.document.encoded.ids) for sample in samples])
    labels = torch.cat([torch.from_numpy(sample.document.encoded.labels) for sample in samples])
    lengths = [len(sample) for sample in samples]
    ends = torch.tensor([0, *accumulate(lengths)])
    labels[ends[:-1]] = IGNORE_INDEX
    tensors = {
        "input_ids": ids[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends.int(),
        "cu_seq_lens_k": ends.int(),
        **images_of(samples),
    }
    longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return {name: tensor.to(device) for name, tensor in tensors.items()} | longest


class FlashLoop(Loop):
    """Trains on flattened samples. It changes the model, and transformers' OLMo, for good."""

    def __init__(self, model: LlavaNextForConditionalGeneration, recipe: Recipe) -> None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerSwiGLUMLP, liger_rotary_pos_emb

        super().__init__(model, recipe)
        model.set_attn_implementation(attention_implementation())
        modeling_olmo.apply_rotary_pos_emb = liger_rotary_pos_emb
        for module in model.modules():
            if isinstance(module, modeling_olmo.OlmoMLP):
                module.forward = MethodType(LigerSwiGLUMLP.forward, module)
        self.cross_entropy = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)

    def loss(self, batch: Batch, count: torch.Tensor) -> torch.Tensor:
        """Sum over the batch's supervised tokens, divided by the step's `count` of them; a scalar."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state[0]
        targets = F.pad(batch["labels"][0, 1:], (0, 1), value=IGNORE_INDEX)
        loss: torch.Tensor = self.cross_entropy(self.model.lm_head.weight, hidden, targets)
        return loss / count
