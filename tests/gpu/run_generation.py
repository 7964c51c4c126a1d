"""Greedy answers of a tiny random model in bf16: attended one by one, all at once, and with CUDA graphs.

python run_generation.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import megatron_vlm.runtime.megatron_patches  # noqa: F401
from megatron_vlm.config import ConfigError, InferenceConfig, ParallelConfig
from megatron_vlm.config.training import AttentionBackend
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.inference.load import engine_on_ranks
from megatron_vlm.inference.request import SamplingParams
from megatron_vlm.training.checkpoint import load_checkpoint, read_recipe, require_checkpoint
from tests.inference.tiny_model import random_specs, write_tiny_model


def answers(folder: Path, backend: AttentionBackend, graphs: str) -> list[list[tuple[int, float, float]]]:
    """Of each prompt, the tokens, and the log-probabilities of the two most likely ones."""
    recipe, tokenizer = read_recipe(folder), load_tokenizer(folder / "tokenizer")
    recipe.parallel, recipe.training.bf16, recipe.training.attention_backend = ParallelConfig(), True, backend
    config = InferenceConfig(
        inference_max_requests=12,
        inference_dynamic_batching_max_tokens=48,
        inference_dynamic_batching_block_size=256,
        cuda_graph_impl=graphs,  # type: ignore[arg-type]
    )

    def load(chunks: object) -> None:
        load_checkpoint(require_checkpoint(folder), chunks, recipe, tokenizer_fingerprint=tokenizer.fingerprint)  # type: ignore[arg-type]

    with engine_on_ranks(recipe, tokenizer, load, config) as engine:
        assert engine is not None
        params = SamplingParams(24, logprobs=2, ignore_eos=True)
        handles = [engine.submit(spec.prompt(), params) for spec in random_specs(16, 60)]
        outputs = [list(handle) for handle in handles]
    return [[(o.token_id or 0, o.top_logprobs[0][1], o.top_logprobs[1][1]) for o in answer] for answer in outputs]


def main(name: str) -> None:
    folder = Path(name)
    write_tiny_model(folder)
    results: dict[str, object] = {}
    for backend, graphs in (("sdpa", "none"), ("auto", "none"), ("auto", "local")):
        try:
            results[f"{backend}, {graphs}"] = answers(folder / "megatron", backend, graphs)  # type: ignore[arg-type]
        except ConfigError as error:
            results[f"{backend}, {graphs}"] = "; ".join(error.problems)
    (folder / "answers.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
