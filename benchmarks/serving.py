"""Throughput and latency of the generation engine, and of transformers' `generate` for one prompt at a time.

    python -m benchmarks.serving

Both have the same random model, prompts and threads, and generate the same number of tokens: the end-of-sequence token
is ignored. Each client sends its next prompt when the last answer is complete. Prompts are random, so that the prefix
cache would find nothing. transformers serves prompts one after the other: its throughput is the same for any number of
clients.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (must run before megatron.core is imported)
from benchmarks.support import transformers_loop
from benchmarks.support.random_tokenizer import write_tokenizer
from benchmarks.support.report import RESULTS, save, table
from checkpoint_convert.mapping.hf_names import canonical_name
from checkpoint_convert.mapping.param_map import param_map, to_megatron
from checkpoint_convert.megatron.files import tensors_of
from megatron_vlm.config import InferenceConfig, LanguageConfig, ModelConfig, Recipe, VisionConfig
from megatron_vlm.data.processing.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.inference.engine import Engine
from megatron_vlm.inference.request import SamplingParams, TokenPrompt
from megatron_vlm.model.build import build_model
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.launch import distributed


def recipe_of(hidden_size: int, num_layers: int) -> Recipe:
    """A language model with the real one's proportions; the vision tower is not used."""
    vision = VisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14,
        vision_feature_layer=-1,
    )  # fmt: skip
    heads = hidden_size // 64
    language = LanguageConfig(
        hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=4096, max_position_embeddings=2048,
    )  # fmt: skip
    model = ModelConfig(vision, language, image_token_index=4095, image_grid_pinpoints=[[28, 28]])
    return Recipe(model=model)


def same_weights(weights: torch.nn.Module, recipe: Recipe) -> VisionLanguageModel:
    """Our model with the weights of a transformers model."""
    (model,) = build_model(recipe)
    state = weights.state_dict().items()
    tensors = {ours: tensor for name, tensor in state if (ours := canonical_name(name, "llava"))}
    tensors.pop("language_model.lm_head.weight")  # tied
    parameters = tensors_of(model)
    with torch.no_grad():
        for name, tensor in to_megatron(param_map(recipe.model), tensors, "transformers"):
            parameters[name].copy_(tensor)
    return model


@torch.no_grad()
def run_transformers(model: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Tokens per second and times to the first token, one prompt at a time."""
    first, tokens, started = [], [], time.perf_counter()
    model.generation_config.eos_token_id = None
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        begun = time.perf_counter()
        done = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        first.append(time.perf_counter() - begun)
        started += first[-1]  # the first token was timed apart, and is generated again
        done = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        tokens.append(done[0, len(prompt) :].tolist())
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": len(prompts) * new_tokens / seconds,
        "prefill_share": sum(first) / seconds,
        "first_token_seconds": first,
        "tokens": tokens,
    }


def run_engine(engine: Engine, prompts: list[list[int]], new_tokens: int, num_clients: int) -> dict[str, Any]:
    """Tokens per second and times to the first token, with `num_clients` clients that share the prompts."""
    params = SamplingParams(new_tokens, ignore_eos=True)
    first, tokens = [0.0] * len(prompts), [[0]] * len(prompts)
    remaining = iter(range(len(prompts)))

    def client() -> None:
        for number in remaining:
            begun = time.perf_counter()
            outputs = iter(engine.submit(TokenPrompt(prompts[number]), params))
            ids = [next(outputs).token_id]
            first[number] = time.perf_counter() - begun
            tokens[number] = [*ids, *(output.token_id for output in outputs)]  # type: ignore[list-item]

    before, started = engine.stats(), time.perf_counter()
    clients = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    seconds, after = time.perf_counter() - started, engine.stats()
    prefill = after.prefill_seconds - before.prefill_seconds
    decode = after.decode_seconds - before.decode_seconds
    return {
        "tokens_per_second": len(prompts) * new_tokens / seconds,
        "prefill_share": prefill / (prefill + decode),
        "first_token_seconds": first,
        "tokens": tokens,
    }


def run(recipe: Recipe, tokenizer: Tokenizer, arguments: argparse.Namespace) -> dict[str, Any]:
    """All runs: new tokens -> name -> figures. Raises SystemExit if the two generate different tokens."""
    torch.manual_seed(0)
    theirs = transformers_loop.build(recipe).to(current_device()).eval()
    model = same_weights(theirs, recipe)
    chance = random.Random(0)
    shortest, longest = arguments.prompt_tokens

    def random_prompts(count: int) -> list[list[int]]:
        return [
            [chance.randrange(2, 4000) for _ in range(round(shortest + (longest - shortest) * (n + 0.5) / count))]
            for n in chance.sample(range(count), count)
        ]

    config = InferenceConfig(enable_prefix_caching=False, inference_dynamic_batching_max_tokens=arguments.max_tokens)
    results: dict[str, Any] = {}
    with Engine(model, tokenizer, config) as engine:
        for new_tokens in arguments.new_tokens:
            prompts = random_prompts(arguments.baseline_prompts)
            run_transformers(theirs, prompts[:1], 2)  # warm-up
            run_engine(engine, prompts[:1], 2, 1)
            runs = {"transformers": run_transformers(theirs, prompts, new_tokens)}
            for clients in arguments.clients:
                mine = prompts if clients == 1 else random_prompts(2 * clients)
                runs[f"engine, {clients} clients"] = run_engine(engine, mine, new_tokens, clients)
                if clients == 1 and runs["engine, 1 clients"]["tokens"] != runs["transformers"]["tokens"]:
                    raise SystemExit("the engine and transformers generate different tokens")
            results[str(new_tokens)] = runs
    return results


def table_of(results: dict[str, Any]) -> str:
    """A Markdown table of all runs."""
    rows = []
    for new_tokens, runs in results.items():
        for name, figures in runs.items():
            first = sorted(figures["first_token_seconds"])
            rate = figures["tokens_per_second"]
            rows.append(
                [
                    f"{name}, {new_tokens} new tokens",
                    f"{rate:.1f}",
                    f"{rate / runs['transformers']['tokens_per_second']:.2f} x",
                    f"{figures['prefill_share']:.0%}",
                    f"{statistics.median(first):.2f} s",
                    f"{first[min(len(first) - 1, int(0.95 * len(first)))]:.2f} s",
                ]
            )
    return table(["", "tokens/s", "of transformers", "prefill", "first token p50", "p95"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512, help="width of the model, a multiple of 64")
    parser.add_argument("--num-layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="clients at the same time")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[8, 128], help="generated tokens per prompt")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[200, 1500], help="shortest and longest prompt")
    parser.add_argument("--baseline-prompts", type=int, default=6, help="prompts of transformers and of one client")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of a step of the engine at most")
    parser.add_argument("--threads", type=int, default=0, help="threads; 0: one per core")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = recipe_of(arguments.hidden_size, arguments.num_layers)
    with distributed(recipe.parallel), tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        results = run(recipe, load_tokenizer(folder), arguments)
    print(table_of(results))
    for runs in results.values():
        for figures in runs.values():
            del figures["tokens"]
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    print(f"\nwrote {save(arguments.output, 'serving', {'settings': settings, 'results': results})}")


if __name__ == "__main__":
    main()
