"""The loss head against logits and cross entropy: time, extra memory, and whether the gradients are the same.

    python -m benchmarks.loss_head [--tokens 2048 8192] [--vocab-size 50304] [--hidden-size 2048]

Forward and backward, fp32 on a CPU and bf16 on a GPU, where Liger's fused linear cross entropy (arXiv:2410.10989) is
also measured if it is installed. Each way runs in a process of its own. Extra memory is the growth of its peak over
hidden states, weight, and the gradients of both, which every way needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (must run before megatron.core is imported)
from benchmarks.support import report
from benchmarks.support.own_process import run_in_own_process
from benchmarks.train_step import time_call
from megatron_vlm.config import ParallelConfig
from megatron_vlm.runtime.device import current_device, device_name, on_gpu
from megatron_vlm.runtime.launch import distributed

_Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

OURS, PLAIN, LIGER = "megatron-vlm", "logits and cross entropy", "Liger"


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """All logits, then torch's cross entropy in fp32."""
    return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


def _loss_of(name: str) -> _Loss:
    if name == PLAIN:
        return plain
    if name == LIGER:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
        return lambda hidden, weight, targets: liger(weight, hidden, targets)
    from megatron.core import parallel_state

    from megatron_vlm.model.loss import chunked_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()
    return lambda hidden, weight, targets: chunked_cross_entropy(hidden, weight, targets, group)


def _resident(which: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at its peak so far (VmHWM)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which)]
    return 1024 * int(line.split()[1])


def _allocated() -> int:
    return torch.cuda.memory_allocated() if on_gpu() else _resident("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if on_gpu() else _resident("VmHWM")


def measure(
    name: str, tokens: int, vocab_size: int, hidden_size: int, rounds: int, threads: int, file: Path
) -> dict[str, Any]:
    """Seconds of each round, and bytes of extra memory in the first; the gradients go to a file."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator).mul_(hidden_size**-0.5)
    targets = torch.randint(vocab_size, (tokens,), generator=generator)
    with distributed(ParallelConfig()):
        dtype = torch.bfloat16 if on_gpu() else torch.float32
        hidden, weight = (tensor.to(current_device(), dtype).requires_grad_() for tensor in (hidden, weight))
        targets = targets.to(current_device())
        loss_of, seconds, extra, losses = _loss_of(name), [], 0, []

        def step() -> None:
            hidden.grad = weight.grad = None
            loss = loss_of(hidden, weight, targets) / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())

        needed = sum(tensor.numel() * tensor.element_size() for tensor in (hidden, weight))
        before = _allocated()
        for _ in range(rounds):
            seconds.append(time_call(step))
            extra = extra or _peak() - before - needed
    assert hidden.grad is not None and weight.grad is not None
    torch.save({"hidden": hidden.grad.float().cpu(), "weight": weight.grad.float().cpu()}, file)
    return {"seconds": seconds, "extra_bytes": extra, "loss": float(losses[-1])}


def compare(tokens: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every way; its time and extra memory relative to plain, and the largest relative difference of a gradient."""
    found: dict[str, Any] = {}
    with_liger = on_gpu() and importlib.util.find_spec("liger_kernel") is not None
    for name in (PLAIN, OURS, *([LIGER] if with_liger else [])):
        sizes = (tokens, options.vocab_size, options.hidden_size)
        measured = run_in_own_process(
            measure, name, *sizes, options.rounds, options.threads, folder / name, what=f"{name} at {tokens} tokens"
        )
        found[name] = measured | {
            "gradients_differ_by": _difference(folder / name, folder / PLAIN),
            "time_ratio": min(measured["seconds"]) / min((found.get(PLAIN) or measured)["seconds"]),
            "memory_ratio": measured["extra_bytes"] / (found.get(PLAIN) or measured)["extra_bytes"],
        }
    return {"tokens": tokens, "ways": found}


def _difference(ours: Path, theirs: Path) -> float:
    gradients, expected = torch.load(ours), torch.load(theirs)
    return max(float((gradients[part] - expected[part]).norm() / expected[part].norm()) for part in expected)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], metavar="N")
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5, help="the fastest one counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        found = [compare(tokens, options, Path(folder)) for tokens in options.tokens]
    rows = [
        [
            f"{one['tokens']:,} tokens, {name}",
            f"{1000 * min(way['seconds']):,.1f} ms",
            f"{way['time_ratio']:.2f}",
            f"{way['extra_bytes'] / 2**20:,.0f} MiB",
            f"{100 * way['memory_ratio']:.1f} %",
            f"{way['gradients_differ_by']:.1e}",
        ]
        for one in found
        for name, way in one["ways"].items()
    ]
    print(report.table(["", "time", "ratio", "extra memory", "ratio", "gradients differ by"], rows))
    settings = {"vocab_size": options.vocab_size, "hidden_size": options.hidden_size, "rounds": options.rounds}
    name = f"loss_head-{device_name()}".lower().replace(" ", "-")
    print(report.save(options.output, name, {"settings": settings, "sizes": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
