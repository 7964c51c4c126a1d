"""Settings of the generation engine, under Megatron-LM's flag names where it has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class InferenceConfig:
    """Sizes of the running batch, the queue and the key/value cache. They are no part of a recipe."""

    inference_max_requests: int = field(default=32, metadata={"help": "Requests in the running batch at most."})
    inference_max_seq_length: int = field(
        default=0,
        metadata={"help": "Prompt and generated tokens of a request at most; 0 takes max_position_embeddings."},
    )
    inference_dynamic_batching_max_tokens: int = field(
        default=0,
        metadata={
            "help": "Tokens of one step at most; longer prompts are prefilled in chunks. 0: 2048 on a GPU, 512 on a "
            "CPU."
        },
    )
    inference_dynamic_batching_block_size: int = field(
        default=64, metadata={"help": "Tokens per block of the key/value cache."}
    )
    inference_dynamic_batching_buffer_size_gb: float = field(
        default=0.0,
        metadata={
            "help": "Memory of the key/value cache on each rank at most, in GiB. 0: four fifths of a GPU's memory that "
            "is free when the model is loaded, 2 on a CPU."
        },
    )
    enable_prefix_caching: bool = field(
        default=True,
        metadata={"help": "Keep the keys and values of finished requests for prompts with equal beginnings."},
    )
    max_queued_requests: int = field(
        default=256, metadata={"help": "Waiting requests at most; further ones are rejected."}
    )
    max_cached_images: int = field(
        default=32, metadata={"help": "Images whose features are kept for later requests at most."}
    )
    cuda_graph_impl: Literal["none", "local"] = field(
        default="none",
        metadata={
            "help": "local: launch the kernels of a decode step together, as a CUDA graph. Needs a GPU, one process "
            "per copy of the model, and flash_attn_3, or flash_attn_2 with blocks of a multiple of 256 tokens."
        },
    )
