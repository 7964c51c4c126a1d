"""Cases of saving and loading on several ranks, all in one start of them; results as JSON.

torchrun --nproc-per-node 4 -m tests.training.checkpoint.run_checkpoints FOLDER
"""

from __future__ import annotations

import errno
import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist

import megatron_vlm.runtime.megatron_patches  # noqa: F401

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_vlm.model.sharding import model_sharded_state_dict, sharding_metadata
from megatron_vlm.runtime.launch import process_group
from megatron_vlm.runtime.process_groups import destroy_groups
from megatron_vlm.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    Progress,
    checkpoint_to_resume,
    latest_checkpoint,
)
from megatron_vlm.training.checkpoint import resume as resume_module
from megatron_vlm.training.checkpoint.folder import tracked_iteration
from megatron_vlm.training.checkpoint.shards import optimizer_state
from megatron_vlm.training.checkpoint.writer import ShardWriter
from tests.parallel.layouts import Layout
from tests.training.checkpoint.adapters import adapters_begin_on_a_model_without, adapters_resume_in_another_layout
from tests.training.checkpoint.instances import two_instances_of_the_optimizer
from tests.training.checkpoint.small_run import Run, furthest, overlaps, weights_of


def resume_in_another_layout(folder: Path) -> dict[str, Any]:
    """Saved after two steps in one layout and loaded in the next: the losses of the third step agree."""
    layouts = [
        Layout(), Layout(tp=2, pp=2, stages="E|t*4L"), Layout(tp=2), Layout(pp=2, vpp=2), Layout(cp=2),
        Layout(pp=4, stages="auto"), Layout(tp=2, pp=2),
    ]  # fmt: skip
    run = Run(layouts[0], folder / "0")
    run.train(2)
    run.save(2)
    expected = run.train(1)
    destroy_groups()
    found = {}
    for number, layout in enumerate(layouts[1:], 1):
        run = Run(layout, folder / str(number - 1))
        run.load()
        run.recipe.training.save = str(folder / str(number))
        run.save(2)
        run.skip(2)
        found[layout.name] = run.train(1)[0] / expected[0] - 1
        destroy_groups()
    return {"loss": found}


def nothing_is_gathered(folder: Path) -> dict[str, Any]:
    """Every data rank writes its share of weights and state, and none asks for the others'."""
    run = Run(Layout(), folder)
    run.train(1)

    def gathered(*_: Any, **__: Any) -> None:
        raise AssertionError("the optimizer's state was gathered")

    original, DistributedOptimizer.get_parameter_state_dp_zero = (
        DistributedOptimizer.get_parameter_state_dp_zero,
        gathered,
    )
    checkpoint = run.save(1)
    run.load()
    DistributedOptimizer.get_parameter_state_dp_zero = original
    dist.barrier()
    sizes = [path.stat().st_size for path in sorted(checkpoint.glob("*.distcp"))]
    overlapping = overlaps(checkpoint)
    destroy_groups()
    return {"sizes": sizes, "overlapping": overlapping}


def megatron_core_reads_it(folder: Path) -> dict[str, Any]:
    """megatron-core's own loading gives the same weights and optimizer state."""
    run = Run(Layout(tp=2), folder)
    run.train(2)
    checkpoint = run.save(2)
    state: dict[str, Any] = {f"chunk{i}": model_sharded_state_dict(chunk) for i, chunk in enumerate(run.chunks)}
    metadata = sharding_metadata()
    state["optimizer"] = run.optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
    before = weights_of(run)
    own = optimizer_state(run.optimizer, run.chunks, loading=False)
    kept = [shard.tensor.clone() for shard in own.shards]
    loaded = dist_checkpointing.load(state, str(checkpoint))
    after = [p.detach() for chunk in run.chunks for p in chunk.parameters()]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    run.optimizer.load_state_dict(loaded["optimizer"])
    own = optimizer_state(run.optimizer, run.chunks, loading=False)
    same_state = all(torch.equal(a, b.tensor) for a, b in zip(kept, own.shards, strict=True))
    destroy_groups()
    return {"weights": same, "optimizer": same_state, "tensors": len(kept)}


def stale_weights(folder: Path) -> dict[str, Any]:
    """With overlap_param_gather and several buckets, the checkpoint holds the weights of after the last step."""
    parallel = {"ddp_bucket_size": 2000, "overlap_grad_reduce": True, "overlap_param_gather": True}
    run = Run(Layout(), folder, **parallel)
    buckets = sum(len(buffer.buckets) for chunk in run.chunks for buffer in chunk.buffers)
    run.train(2)
    before = weights_of(run)
    run.save(2)
    for chunk in run.chunks:
        chunk.start_param_sync(force_sync=True)
    live = weights_of(run)
    destroy_groups()
    run = Run(Layout(), folder)
    run.load()
    saved = weights_of(run)
    destroy_groups()
    return {"buckets": buckets, "furthest": furthest(live, saved), "stale_before": furthest(before, live)}


def _save_failing(checkpointer: Checkpointer, run: Run, iteration: int) -> list[str]:
    """What every rank says of a save."""
    checkpointer.save(run.chunks, Progress(iteration=iteration), run.optimizer, run.schedule)
    messages = [""] * dist.get_world_size()
    try:
        checkpointer.wait()
        mine = "nothing was reported"
    except CheckpointError as error:
        mine = str(error)
    dist.all_gather_object(messages, mine)
    return messages


@contextmanager
def full_before_writing() -> Iterator[None]:
    write = ShardWriter.write_data

    def full(self: Any, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.target))
        return write(self, plan, planner)

    ShardWriter.write_data = full
    yield
    ShardWriter.write_data = write


@contextmanager
def full_in_the_middle() -> Iterator[None]:
    """The operating system writes a part of a file, and no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def writer_dies() -> Iterator[None]:
    """The thread that writes ends without an error of any known kind."""
    write = ShardWriter.write_data

    def dies(self: Any, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 2:
            raise SystemExit(3)
        return write(self, plan, planner)

    ShardWriter.write_data = dies
    yield
    ShardWriter.write_data = write


def one_rank_cannot_write(folder: Path) -> dict[str, Any]:
    """Every rank reports it, the older checkpoint stays, training and the next save continue."""
    run = Run(Layout(), folder)
    run.save(1)
    checkpointer = Checkpointer(run.recipe)
    messages, latest = {}, {}
    for number, case in enumerate((full_before_writing, full_in_the_middle, writer_dies), 2):
        with case():
            messages[case.__name__] = _save_failing(checkpointer, run, number)
        newest = latest_checkpoint(folder)
        latest[case.__name__] = newest and newest.name
    loss = run.train(1)
    checkpointer.save(run.chunks, Progress(iteration=5), run.optimizer, run.schedule)
    checkpointer.close()
    then = latest_checkpoint(folder)
    (expected,) = run.train(1)
    destroy_groups()
    run = Run(Layout(tp=2), folder)
    run.load()
    run.skip(1)
    found = run.train(1)[0] / expected - 1
    destroy_groups()
    return {
        "messages": messages,
        "in_another_layout": found,
        "latest": latest,
        "then": then and then.name,
        "loss": loss,
        "left": sorted(path.name for path in folder.iterdir()),
    }


def a_rank_sees_an_older_listing(folder: Path) -> dict[str, Any]:
    """Of a network file system that shows a rank a new folder late, or never."""
    run = Run(Layout(), folder)
    for iteration in (1, 2):
        run.save(iteration)
    destroy_groups()
    original, patience = resume_module.is_whole, resume_module._VISIBLE_AFTER
    looks, sees_after = 0, 2.0

    def is_whole(checkpoint: Path) -> bool:
        nonlocal looks
        looks += 1
        return original(checkpoint) and (dist.get_rank() != 2 or looks > sees_after)

    resume_module.is_whole = is_whole
    late = checkpoint_to_resume(str(folder), None)
    resume_module._VISIBLE_AFTER, sees_after = 0.2, float("inf")
    message = ""
    try:
        checkpoint_to_resume(str(folder), None)
    except CheckpointError as error:
        message = str(error)
    resume_module.is_whole, resume_module._VISIBLE_AFTER = original, patience
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (late and late.name, message))
    return {"late": [name for name, _ in found], "never": [message for _, message in found]}


def training_changes_nothing_that_is_being_written(folder: Path) -> dict[str, Any]:
    """A save that is not waited for holds the weights of its moment."""
    run = Run(Layout(tp=2), folder)
    run.train(1)
    before = weights_of(run)
    checkpointer, progress, trained = Checkpointer(run.recipe), Progress(iteration=1), Event()
    begin = checkpointer._destination.begin

    def late(iteration: int) -> Any:
        trained.wait()
        return begin(iteration)

    checkpointer._destination.begin = late  # type: ignore[method-assign]
    checkpointer.save(run.chunks, progress, run.optimizer, run.schedule)
    run.train(2)
    progress.iteration = 3
    trained.set()
    checkpointer.close()
    moved = weights_of(run)
    run.load()
    after = weights_of(run)
    destroy_groups()
    return {
        "same": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "moved": any(not torch.equal(a, b) for a, b in zip(before, moved, strict=True)),
        "tracked": tracked_iteration(folder),
        "found": latest_checkpoint(folder).name,  # type: ignore[union-attr]
    }


CASES: list[Callable[[Path], dict[str, Any]]] = [
    resume_in_another_layout,
    adapters_resume_in_another_layout,
    adapters_begin_on_a_model_without,
    nothing_is_gathered,
    megatron_core_reads_it,
    stale_weights,
    two_instances_of_the_optimizer,
    one_rank_cannot_write,
    a_rank_sees_an_older_listing,
    training_changes_nothing_that_is_being_written,
]


def main(folder: Path) -> None:
    with process_group(timeout_minutes=2):
        results = {}
        for case in CASES:
            results[case.__name__] = case(folder / case.__name__)
            dist.barrier()
        if dist.get_rank() == 0:
            (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
