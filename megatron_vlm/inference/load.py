"""An engine with a model that is loaded for it, on all ranks of a parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_vlm.config import InferenceConfig, ParallelConfig, Recipe, check_inference
from megatron_vlm.data.processing.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.inference.engine import Engine
from megatron_vlm.inference.ranks import engine_rank, serve_rank
from megatron_vlm.model.build import build_model
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.runtime.launch import distributed
from megatron_vlm.training.checkpoint import load_checkpoint, read_recipe, require_checkpoint


@contextmanager
def engine_on_ranks(
    recipe: Recipe,
    tokenizer: Tokenizer,
    load_weights: Callable[[list[VisionLanguageModel]], None],
    config: InferenceConfig | None = None,
    timeout_minutes: int = 10,
) -> Iterator[Engine | None]:
    """An engine for the model of a recipe; usable inside the block. Every rank of the world enters it.

    Args:
        recipe: its parallel sizes are the engine's. With more processes than they need, there are as many copies of the
            model, each with an engine.
        tokenizer: the model's.
        load_weights: fills the model chunks of this rank, in the block's process groups.
        config: sizes of the engine.
        timeout_minutes: how long ranks wait for each other in the block's collectives.

    On ranks without an engine, the block begins after that of their copy is closed, with None.
    """
    config = config or InferenceConfig()
    check_inference(config, recipe)
    with distributed(recipe.parallel, timeout_minutes=timeout_minutes):
        chunks = build_model(recipe)
        load_weights(chunks)
        if torch.distributed.get_rank() == engine_rank():
            with Engine(chunks, tokenizer, config, only_inference=True) as engine:
                yield engine
        else:
            serve_rank(chunks, config, only_inference=True)
            yield None


@contextmanager
def load_engine(
    folder: str | Path,
    config: InferenceConfig | None = None,
    parallel: ParallelConfig | None = None,
    timeout_minutes: int = 10,
) -> Iterator[Engine | None]:
    """An engine for the newest checkpoint in `folder`, with the tokenizer saved there; usable inside the block.

    The checkpoint may have been written in any parallel layout. `parallel` sets that of the engine. What happens on the
    ranks, and the timeout: engine_on_ranks.

    Raises:
        CheckpointError: there is no finished checkpoint.
        DataError: the folder has no tokenizer.
        ConfigError: wrong settings, or the number of processes does not match `parallel`.
    """
    checkpoint, recipe = require_checkpoint(folder), read_recipe(folder)
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    recipe.parallel = parallel or ParallelConfig()

    def load_weights(chunks: list[VisionLanguageModel]) -> None:
        load_checkpoint(checkpoint, chunks, recipe, tokenizer_fingerprint=tokenizer.fingerprint)

    with engine_on_ranks(recipe, tokenizer, load_weights, config, timeout_minutes) as engine:
        yield engine
