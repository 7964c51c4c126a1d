"""On two ranks, with an S3 server: a checkpoint loads in another layout, and a save that fails harms nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vlm.runtime.launch import process_group
from megatron_vlm.runtime.process_groups import destroy_groups
from megatron_vlm.runtime.s3 import client, multipart, objects, ranges
from megatron_vlm.training.checkpoint import Checkpointer, CheckpointError, Progress, latest_checkpoint
from tests.parallel.layouts import Layout
from tests.support.s3_server import BUCKET
from tests.training.checkpoint.small_run import Run, weights_of

URL = f"s3://{BUCKET}/run"


def another_layout() -> dict[str, Any]:
    """Saved on two data ranks, loaded on two tensor ranks: the loss of the next step agrees."""
    run = Run(Layout(), URL)  # type: ignore[arg-type]
    run.train(1)
    run.save(1)
    (expected,) = run.train(1)
    destroy_groups()
    run = Run(Layout(tp=2), URL)  # type: ignore[arg-type]
    run.load()
    run.skip(1)
    found = run.train(1)[0] / expected - 1
    destroy_groups()
    files = objects.list_names(URL)
    written = sum(len(objects.read_bytes(f"{URL}/{name}")) for name in files if name.endswith(".distcp"))
    return {"loss": found, "files": files, "written": written}


@contextmanager
def _counted_reads() -> Iterator[dict[str, int]]:
    """Bytes of tensors that this rank requests inside the block, by file."""
    requested: dict[str, int] = {}
    read = ranges.read_into

    def counted(url: str, start: int, target: memoryview) -> None:
        requested[url] = requested.get(url, 0) + len(target)
        read(url, start, target)

    ranges.read_into = counted
    yield requested
    ranges.read_into = read


def network_down_in_mid_save() -> dict[str, Any]:
    """The store takes no second part of rank 1's file: all ranks report it; older checkpoints and training continue."""
    run = Run(Layout(), URL)  # type: ignore[arg-type]
    with _counted_reads() as requested:
        run.load()
    checkpointer = Checkpointer(run.recipe)
    checkpointer.save(run.chunks, Progress(iteration=2), run.optimizer, run.schedule)
    try:
        checkpointer.wait()
        mine = "nothing was reported"
    except CheckpointError as error:
        mine = str(error)
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, mine)
    latest = latest_checkpoint(URL)
    loss = run.train(1)
    dist.barrier()
    checkpointer.save(run.chunks, Progress(iteration=3), run.optimizer, run.schedule)
    before = weights_of(run)
    checkpointer.close()
    run.train(1)
    run.load()
    same = all(bool((a == b).all()) for a, b in zip(before, weights_of(run), strict=True))
    destroy_groups()
    found = {"messages": messages, "latest": str(latest), "loss": loss, "same": same, "requested": requested}
    return found | {"left": objects.list_folder(URL)}


def main(results: Path) -> None:
    client.retry_policy = client.RetryPolicy(attempts=2, first_delay=0.02, timeout=20.0)
    multipart.PART_BYTES = 100_000
    with process_group(timeout_minutes=2):
        found = {}
        for case in (another_layout, network_down_in_mid_save):
            found[case.__name__] = case()
            dist.barrier()
        every_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every_rank, found)
        if dist.get_rank() == 0:
            results.write_text(json.dumps(every_rank))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
