"""Generate on the ranks of some parallel layouts; each rank with an engine writes OUT + its rank. For test_ranks.py.

run_ranks.py CHECKPOINT SPECS.json OUT NEW_TOKENS TPxPPxVPPxCP...
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (before megatron.core is imported)

# isort: split
from megatron.core import tensor_parallel

from megatron_vlm.config import InferenceConfig, ParallelConfig
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.inference.engine import Engine
from megatron_vlm.inference.ranks import engine_rank, serve_rank
from megatron_vlm.inference.request import SamplingParams, TokenPrompt
from megatron_vlm.model.build import build_model
from megatron_vlm.runtime.launch import process_group
from megatron_vlm.runtime.process_groups import destroy_groups, initialize_groups
from megatron_vlm.training.checkpoint import load_checkpoint, read_recipe, require_checkpoint
from tests.inference.tiny_model import PromptSpec

CONFIG = InferenceConfig(
    inference_max_requests=16,
    inference_dynamic_batching_max_tokens=256,
    inference_dynamic_batching_block_size=16,
    max_queued_requests=1000,
    max_cached_images=4,
)


def generate_at_random_times(engine: Engine, specs: list[PromptSpec], new_tokens: int) -> dict[str, Any]:
    """Tokens and log-probabilities of each prompt, the largest batch, and the blocks that were leaked.

    16 clients take a prompt each at random times. Some send an invalid request too, or one that they cancel.
    """
    params = SamplingParams(new_tokens, ignore_eos=True, logprobs=0)

    def client(spec: PromptSpec) -> dict[str, Any]:
        chance = random.Random(spec.seed)
        time.sleep(chance.random() * 0.5)
        if spec.seed % 4 == 0:
            cancelled = engine.submit(spec.prompt(), params)
            time.sleep(chance.random() * 0.1)
            cancelled.cancel()
        if spec.seed % 5 == 0:
            with contextlib.suppress(ValueError):
                engine.submit(TokenPrompt([-1]), params)
        handle, running = engine.submit(spec.prompt(), params), 0
        outputs = []
        for output in handle:
            outputs.append(output)
            running = max(running, engine.stats().running)
        return {
            "tokens": [output.token_id for output in outputs],
            "logprobs": [output.logprob for output in outputs],
            "prompt_tokens": handle.prompt_tokens,
            "running": running,
        }

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(client, specs))
    engine.close()
    stats = engine.stats()
    return {"answers": answers, "leaked": stats.total_blocks - stats.free_blocks, "finished": stats.finished}


def main() -> None:
    checkpoint, specs_file, out, new_tokens, *layouts = sys.argv[1:]
    specs = [PromptSpec(**spec) for spec in json.loads(Path(specs_file).read_text())]
    results = {}
    with process_group():
        for layout in layouts:
            recipe = read_recipe(checkpoint)
            tensor, pipeline, virtual, context = map(int, layout.split("x"))
            recipe.parallel = ParallelConfig(
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=virtual,
                context_parallel_size=context,
            )
            initialize_groups(recipe.parallel)
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            chunks = build_model(recipe)
            load_checkpoint(require_checkpoint(checkpoint), chunks, recipe)
            if dist.get_rank() == engine_rank():
                engine = Engine(chunks, load_tokenizer(Path(checkpoint) / "tokenizer"), CONFIG)
                results[layout] = generate_at_random_times(engine, specs, int(new_tokens))
            else:
                serve_rank(chunks, CONFIG)
            destroy_groups()
        if results:
            Path(f"{out}{dist.get_rank()}").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
