"""How long saving a checkpoint keeps training waiting, asynchronously and not, and how much memory it takes.

    torchrun --nproc-per-node 2 -m benchmarks.checkpoint --folder DIR
    python -m benchmarks.checkpoint --ranks 2 --folder DIR                  starts torchrun itself

Both ways write the same files with the same thread, synced to the disk; only the waiting differs. Steps run before a
save and while one is written. The size of a rank's share is set with --hidden-size.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (must run before megatron.core is imported)
from benchmarks.support.report import RESULTS, save, table
from megatron_vlm.config import DataConfig, LanguageConfig, ModelConfig, ParallelConfig, Recipe, TrainingConfig
from megatron_vlm.config import VisionConfig as Vision
from megatron_vlm.data.rows.batch import PackedBatch
from megatron_vlm.model.build import build_model
from megatron_vlm.model.initialize import initialize_weights
from megatron_vlm.runtime.launch import distributed
from megatron_vlm.runtime.process_groups import parallel_ranks
from megatron_vlm.training.checkpoint import Checkpointer, Progress
from megatron_vlm.training.finite_update import update
from megatron_vlm.training.optimizer import build_optimizer, build_schedule, wrap_for_data_parallel
from megatron_vlm.training.step import forward_backward

SEQ_LENGTH = 64


def recipe_of(hidden_size: int, ranks: int, folder: Path) -> Recipe:
    """A model of which nearly all parameters are the decoder's."""
    vision = Vision(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    language = LanguageConfig(
        hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=8,
        num_attention_heads=max(hidden_size // 64, 1), num_key_value_heads=max(hidden_size // 64, 1), vocab_size=1024,
        max_position_embeddings=SEQ_LENGTH,
    )  # fmt: skip
    return Recipe(
        model=ModelConfig(vision, language, image_token_index=1023, image_grid_pinpoints=[[28, 28]]),
        data=DataConfig(seq_length=SEQ_LENGTH),
        training=TrainingConfig(global_batch_size=ranks, lr=1e-5, save=str(folder)),
        parallel=ParallelConfig(),
    )


def text_row(seed: int) -> PackedBatch:
    """A row of one document without images."""
    tokens = torch.randint(2, 1000, (SEQ_LENGTH,), generator=torch.Generator().manual_seed(seed))
    nothing = torch.empty(0, dtype=torch.int64)
    return PackedBatch(
        tokens=tokens, labels=tokens.roll(-1), positions=torch.arange(SEQ_LENGTH), cu_seqlens=[0, SEQ_LENGTH],
        feature_positions=nothing, feature_sources=nothing, num_tiles=0, num_tokens=SEQ_LENGTH,
    )  # fmt: skip


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Bench:
    """A model that trains on one row per rank and step."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.rank = recipe, parallel_ranks().data
        chunks = build_model(recipe)
        initialize_weights(chunks, recipe)
        self.chunks = wrap_for_data_parallel(chunks, recipe)
        self.optimizer = build_optimizer(self.chunks, recipe)
        self.schedule = build_schedule(self.optimizer, recipe)
        self.checkpointer = Checkpointer(recipe)
        self.progress = Progress()

    def step(self) -> float:
        """Train once; seconds."""
        started = time.perf_counter()
        forward_backward(self.chunks, [iter([text_row(self.rank)])], self.recipe)
        update(self.optimizer)
        self.progress.iteration += 1
        return time.perf_counter() - started

    def save(self, *, wait: bool) -> float:
        """Save; seconds until training may continue, on the slowest rank."""
        dist.barrier()
        self.checkpointer.save(self.chunks, self.progress, self.optimizer, self.schedule, wait=wait)
        blocked = torch.tensor(self.checkpointer.blocked_seconds)
        dist.all_reduce(blocked, op=dist.ReduceOp.MAX)
        return float(blocked)

    def is_writing(self) -> bool:
        """Whether a save is being written on any rank. A collective call."""
        writing = torch.tensor(int(self.checkpointer.is_writing_here()))
        dist.all_reduce(writing, op=dist.ReduceOp.MAX)
        return bool(writing)


def measure(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """All figures, on rank 0."""
    bench = Bench(recipe)
    for _ in range(3):
        bench.step()
    before = peak_bytes()
    bench.save(wait=True)  # allocates the buffers
    rise = peak_bytes() - before
    alone, beside, sync, overlapped = [], [], [], []
    for _ in range(rounds):
        bench.step()
        sync.append(bench.save(wait=True))
        alone += [bench.step() for _ in range(3)]
        overlapped.append(bench.save(wait=False))
        while bench.is_writing():
            beside.append(bench.step())
        bench.checkpointer.wait()
    share = sum(buffer.nbytes for buffer in bench.checkpointer.buffers)
    figures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(figures, {"share_bytes": share, "peak_rise_bytes": rise})
    bench.checkpointer.close()
    return {
        "ranks": figures,
        "sync_blocked_seconds": statistics.median(sync),
        "async_blocked_seconds": statistics.median(overlapped),
        "step_seconds": statistics.median(alone),
        "step_while_writing_seconds": statistics.median(beside) if beside else None,
        "steps_while_writing": len(beside) / rounds,
    }


def report(found: dict[str, Any]) -> str:
    """The figures as a table."""
    share = max(rank["share_bytes"] for rank in found["ranks"])
    rise = max(rank["peak_rise_bytes"] for rank in found["ranks"])
    slower = found["step_while_writing_seconds"]
    rows = [
        ["share of the largest rank", f"{share / 2**30:.2f} GiB"],
        ["rise of peak memory, in shares", f"{rise / share:.2f}"],
        ["training waits, synchronous", f"{found['sync_blocked_seconds']:.2f} s"],
        ["training waits, asynchronous", f"{found['async_blocked_seconds']:.2f} s"],
        ["asynchronous / synchronous", f"{100 * found['async_blocked_seconds'] / found['sync_blocked_seconds']:.1f} %"],
        ["step, nothing being written", f"{found['step_seconds']:.2f} s"],
        ["step while writing", f"{slower:.2f} s" if slower is not None else "none was needed"],
    ]
    return table([f"{len(found['ranks'])} data-parallel ranks", ""], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints go here; a disk, not memory")
    parser.add_argument("--ranks", type=int, default=1, help="start this many ranks; under torchrun leave it out")
    parser.add_argument("--hidden-size", type=int, default=1152, help="of the decoder, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    if options.ranks > 1 and not dist.is_torchelastic_launched():
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        sys.exit(subprocess.call([*command, str(options.ranks), "-m", "benchmarks.checkpoint", *sys.argv[1:]]))
    with distributed(ParallelConfig()):
        found = measure(recipe_of(options.hidden_size, dist.get_world_size(), options.folder), options.rounds)
        if dist.get_rank() == 0:
            print(report(found))
            save(options.output, "checkpoint", found)


if __name__ == "__main__":
    main()
