"""Throughput and latency of the generation engine and `megatron-vlm serve`, of transformers' `generate` and its server.

    python -m benchmarks.serving

All have the same random model, prompts and threads, and generate the same number of tokens: the end-of-sequence token
is ignored. A client sends its next prompt when its last answer is complete; in the runs "at half of capacity", requests
arrive at random times, at half the rate that the engine reached with the most clients. Prompts are random, so that the
prefix cache would find nothing. transformers answers one prompt after the other, and so does its server where the model
takes images: their throughput is the same for any number of clients.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (must run before megatron.core is imported)
from benchmarks.support import decode_step, http_servers, serving_peers, transformers_loop
from benchmarks.support.report import RESULTS, save, table
from benchmarks.support.serving_clients import Run, closed_loop, random_arrivals
from benchmarks.support.serving_model import recipe_of, same_weights
from megatron_vlm.config import ConfigError, InferenceConfig
from megatron_vlm.data.processing.tokenizer import load_tokenizer
from megatron_vlm.inference.engine import Engine
from megatron_vlm.inference.request import SamplingParams, TokenPrompt
from megatron_vlm.inference.sizes import block_bytes
from megatron_vlm.runtime.device import current_device, on_gpu
from megatron_vlm.runtime.launch import distributed

Prompts = list[list[int]]
Runs = dict[str, Run]
"""Name -> figures."""
GENERATE, SERVE = "transformers", "transformers serve"
PROMPTS_PER_CLIENT = 8
"""So that the time in which the batch fills and empties decides little."""
UNLOADED, ARRIVALS = "engine, first tokens of one request at a time", "engine, at half of capacity"


def random_prompts(chance: random.Random, count: int, shortest: int, longest: int) -> Prompts:
    """Random tokens; the lengths are evenly spaced, in random order."""
    lengths = [round(shortest + (longest - shortest) * (number + 0.5) / count) for number in range(count)]
    return [[chance.randrange(2, 4000) for _ in range(length)] for length in chance.sample(lengths, count)]


def generate_before_and_after(theirs: Any, asked: Prompts, new_tokens: int, between: Callable[[], Runs]) -> Runs:
    """transformers' `generate` before and after other runs, as one run, and those: a machine's speed changes."""

    def generate() -> Run:
        serving_peers.generate_one_by_one(theirs, asked[:1], 2)  # warm-up
        return serving_peers.generate_one_by_one(theirs, asked, new_tokens)

    before, others, after = generate(), between(), generate()
    first = before.first_token_seconds + after.first_token_seconds
    tokens_per_second = 2 / (1 / before.tokens_per_second + 1 / after.tokens_per_second)
    prefill_share = sum(first) * tokens_per_second / (2 * len(asked) * new_tokens)
    return {GENERATE: Run(tokens_per_second, first, before.tokens, prefill_share)} | others


def run_transformers_serve(
    results: dict[int, Runs], export: Path, prompts: dict[int, Prompts], bf16: bool
) -> str | None:
    """Add the runs of `transformers serve` to the results; returns the reason if it could not be measured."""
    try:
        with http_servers.transformers_serve(export, torch.get_num_threads(), bf16) as ask:
            for new_tokens, asked in prompts.items():
                closed_loop(ask, asked[:1], 2, 1)
                results[new_tokens][SERVE] = closed_loop(ask, asked, new_tokens, len(asked))
    except http_servers.ServerDidNotStart as reason:
        return str(reason)
    return None


def run_our_server(
    results: dict[int, Runs], export: Path, config: InferenceConfig, arguments: argparse.Namespace
) -> None:
    """Add the runs of `megatron-vlm serve` with the most clients to the results."""
    clients, chance = max(arguments.clients), random.Random(1)
    with http_servers.megatron_vlm_serve(export, config, torch.get_num_threads()) as ask:
        for new_tokens, runs in results.items():
            asked = random_prompts(chance, PROMPTS_PER_CLIENT * clients, *arguments.prompt_tokens)
            closed_loop(ask, asked[:1], 2, 1)
            runs[f"megatron-vlm serve, {clients} clients"] = closed_loop(ask, asked, new_tokens, clients)


def ask_engine(engine: Engine, prompt: list[int], count: int) -> Iterator[int]:
    """The tokens of an answer, as they are generated."""
    for output in engine.submit(TokenPrompt(prompt), SamplingParams(count, ignore_eos=True)):
        assert output.token_id is not None
        yield output.token_id


def run_engine(engine: Engine, arguments: argparse.Namespace, new_tokens: int, same: Prompts) -> Runs:
    """All runs of the engine with a number of new tokens; a single client gets the prompts `same`."""

    ask = partial(ask_engine, engine)

    def measured(run: Callable[..., Run], *settings: Any) -> Run:
        before, figures, after = engine.stats(), run(ask, *settings), engine.stats()
        prefill = after.prefill_seconds - before.prefill_seconds
        decode = after.decode_seconds - before.decode_seconds
        return replace(figures, prefill_share=prefill / (prefill + decode))

    chance, runs = random.Random(new_tokens), Runs()
    closed_loop(ask, same[:1], 2, 1)  # warm-up
    for clients in arguments.clients:
        asked = same if clients == 1 else random_prompts(chance, PROMPTS_PER_CLIENT * clients, *arguments.prompt_tokens)
        last = measured(closed_loop, asked, new_tokens, clients)
        runs[f"engine, {clients} client{'s' * (clients > 1)}"] = last
    asked = random_prompts(chance, 2 * max(arguments.clients), *arguments.prompt_tokens)
    runs[UNLOADED] = measured(closed_loop, asked, 1, 1)
    runs[ARRIVALS] = measured(random_arrivals, asked, new_tokens, last.tokens_per_second / new_tokens / 2)
    return runs


def table_of(results: dict[int, Runs]) -> str:
    """A Markdown table of all runs but those that only generate first tokens."""
    rows = []
    for new_tokens, runs in results.items():
        for name, run in runs.items():
            if name == UNLOADED:
                continue
            first = sorted(run.first_token_seconds)
            rows.append(
                [
                    f"{name}, {new_tokens} new tokens",
                    f"{run.tokens_per_second:.1f}",
                    f"{run.tokens_per_second / runs[GENERATE].tokens_per_second:.2f} x",
                    "" if run.prefill_share is None else f"{run.prefill_share:.0%}",
                    f"{statistics.median(first):.2f} s",
                    f"{first[min(len(first) - 1, int(0.95 * len(first)))]:.2f} s",
                ]
            )
    return table(["", "tokens/s", "of transformers", "prefill", "first token p50", "p95"], rows)


def first_token_line(new_tokens: int, runs: Runs) -> str:
    """How much longer the first token takes at half of capacity than for one request at a time."""
    unloaded, loaded = (statistics.median(runs[name].first_token_seconds) for name in (UNLOADED, ARRIVALS))
    return (
        f"{new_tokens} new tokens: the median first token at half of capacity takes {loaded:.2f} s, "
        f"{loaded / unloaded:.2f} x that of one request at a time"
    )


@dataclass
class Results:
    """Everything that was measured."""

    runs: dict[int, Runs]
    """By the number of new tokens."""
    decode: dict[str, decode_step.DecodeStep]
    """By how the steps were launched."""
    without_graphs: str | None
    """Why CUDA graphs were not measured."""
    problems: list[str]
    """Who generated other tokens, and why `transformers serve` could not be measured."""


def run(arguments: argparse.Namespace, folder: Path) -> Results:
    """All runs, with the folder for files."""
    recipe = recipe_of(arguments.hidden_size, arguments.num_layers, arguments.vocab_size, arguments.bf16)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    vocab_size = recipe.model.language.vocab_size
    serving_peers.write_word_tokenizer(folder, vocab_size)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(0)
    theirs = transformers_loop.build(recipe).to(current_device(), dtype).eval()
    theirs.generation_config.eos_token_id = None
    serving_peers.write_model(theirs, recipe.model, tokenizer, folder / "export", dtype)
    chance = random.Random(0)
    prompts = {
        new_tokens: random_prompts(chance, arguments.baseline_prompts, *arguments.prompt_tokens)
        for new_tokens in arguments.new_tokens
    }
    ours = same_weights(theirs, recipe)
    longest = arguments.prompt_tokens[1] + max(arguments.new_tokens) + decode_step.STEPS + 64
    config = InferenceConfig(
        enable_prefix_caching=False,
        inference_dynamic_batching_max_tokens=arguments.max_tokens,
        # flash_attn_2 reads no smaller ones.
        inference_dynamic_batching_block_size=256
        if on_gpu()
        else InferenceConfig.inference_dynamic_batching_block_size,
        # So that no client waits for blocks.
        inference_dynamic_batching_buffer_size_gb=2 * max(arguments.clients) * longest * block_bytes([ours], 1) / 2**30,
    )
    results = {}
    for new_tokens, asked in prompts.items():

        def of_engine(new_tokens: int = new_tokens, asked: Prompts = asked) -> Runs:
            # Not open while others are measured: a second thread's OpenMP threads would slow them down.
            with Engine(ours, tokenizer, config, only_inference=True) as engine:
                return run_engine(engine, arguments, new_tokens, asked)

        results[new_tokens] = generate_before_and_after(theirs, asked, new_tokens, of_engine)
    length, clients = sum(arguments.prompt_tokens) // 2, max(arguments.clients)
    same_length = random_prompts(chance, clients, length, length)
    with Engine(ours, tokenizer, config, only_inference=True) as engine:
        decode = {"one kernel at a time": decode_step.measure(engine, same_length)}
    without_graphs = None
    try:
        with Engine(ours, tokenizer, replace(config, cuda_graph_impl="local"), only_inference=True) as engine:
            decode["CUDA graphs"] = decode_step.measure(engine, same_length)
            for new_tokens, runs in results.items():
                asked = random_prompts(random.Random(2), PROMPTS_PER_CLIENT * clients, *arguments.prompt_tokens)
                runs[f"engine with CUDA graphs, {clients} clients"] = closed_loop(
                    partial(ask_engine, engine), asked, new_tokens, clients
                )
    except ConfigError as error:
        without_graphs = "; ".join(error.problems)
    run_our_server(results, folder / "export", config, arguments)
    problem = run_transformers_serve(results, folder / "export", prompts, arguments.bf16)
    problems = [] if problem is None else [f"{SERVE} could not be measured: {problem}"]
    if not arguments.bf16:  # otherwise roundings decide
        problems += different_tokens(results, range(vocab_size - serving_peers.NUM_SPECIAL))
    return Results(results, decode, without_graphs, problems)


def different_tokens(results: dict[int, Runs], words: range) -> list[str]:
    """Who generated other tokens than transformers' `generate`, as messages. The server's answers have `words` only."""
    problems = []
    for new_tokens, runs in results.items():
        expected = runs[GENERATE].tokens
        if "engine, 1 client" in runs and runs["engine, 1 client"].tokens != expected:
            problems.append(f"{new_tokens} new tokens: the engine and transformers' generate differ")
        if SERVE in runs and runs[SERVE].tokens != [[token for token in ids if token in words] for ids in expected]:
            problems.append(f"{new_tokens} new tokens: {SERVE} and transformers' generate differ")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512, help="width of the model, a multiple of 64")
    parser.add_argument("--num-layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--vocab-size", type=int, default=4096, help="size of its vocabulary, at least 4,096")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="clients at the same time")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[8, 128], help="generated tokens per prompt")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[200, 1500], help="shortest and longest prompt")
    parser.add_argument("--baseline-prompts", type=int, default=6, help="prompts of transformers and of one client")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=InferenceConfig.inference_dynamic_batching_max_tokens,
        help="tokens of a step of the engine at most; 0: its default",
    )
    parser.add_argument("--bf16", action="store_true", help="weights in bf16; tokens are not compared then")
    parser.add_argument("--threads", type=int, default=0, help="threads; 0: one per core")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = recipe_of(arguments.hidden_size, arguments.num_layers, arguments.vocab_size, arguments.bf16)
    with distributed(recipe.parallel), tempfile.TemporaryDirectory() as folder:
        results = run(arguments, Path(folder))
    print(table_of(results.runs))
    for new_tokens, runs in results.runs.items():
        print(first_token_line(new_tokens, runs))
    for launched, decode in results.decode.items():
        print(f"{launched}: {decode}")
    if results.without_graphs:
        print(f"CUDA graphs were not measured: {results.without_graphs}")
    figures = {
        str(new_tokens): {
            name: {key: value for key, value in vars(run).items() if key != "tokens"} for name, run in runs.items()
        }
        for new_tokens, runs in results.runs.items()
    }
    decode_figures = {launched: vars(decode) for launched, decode in results.decode.items()}
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    content = {"settings": settings, "results": figures, "decode": decode_figures, "problems": results.problems}
    print(f"\nwrote {save(arguments.output, 'serving', content)}")
    if results.problems:
        raise SystemExit("\n".join(results.problems))


if __name__ == "__main__":
    main()
