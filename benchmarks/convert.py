"""How long a conversion takes beside copying the same files, and how much memory it needs.

    python -m benchmarks.convert [--dtype float32] [--work DIR]

The model is Instella-VL-1B in size, 1,486,569,472 random parameters. Each conversion runs in a process of its own,
which samples its anonymous memory (RssAnon of /proc/self/status; mapped files are not counted, the kernel drops them
at will).
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.random_folder import write_random_folder
from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.megatron_to_hf import DTYPES
from megatron_vlm.config import ModelConfig
from tests.random_models import write_tokenizer

SAMPLE_SECONDS = 0.02


def anonymous_bytes() -> int:
    """Anonymous memory of this process that is resident, right now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this needs Linux")


def _measured(command: Callable[..., int], arguments: list[str], answer: Connection) -> None:
    peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    before = anonymous_bytes()
    sampler.start()
    start = time.perf_counter()
    code = command(arguments)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    answer.send({"exit": code, "seconds": seconds, "peak_anonymous_bytes": peak, "at_start_bytes": before})


def measure(command: Callable[..., int], arguments: list[str]) -> dict[str, Any]:
    """Run a command's `main` in a process of its own: exit code, seconds, memory at its peak and at its start."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(command, arguments, theirs))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        raise RuntimeError(f"{' '.join(arguments)} ended without an answer") from None
    process.join()
    if found["exit"]:
        raise RuntimeError(f"{' '.join(arguments)} failed")
    return found


def _copy(source: Path, target: Path) -> dict[str, Any]:
    start = time.perf_counter()
    shutil.copytree(source, target)
    return {"seconds": time.perf_counter() - start}


def compare(work: Path, model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Write a random folder into `work`, copy it, convert it there and back."""
    model.image_token_index = write_tokenizer(work / "words")
    folder, megatron, back = work / "folder", work / "megatron", work / "back"
    parameters = write_random_folder(folder, work / "words", model, DTYPES[dtype])
    runs = {"cp": _copy(folder, work / "copy")}
    shutil.rmtree(work / "copy")
    runs["hf_to_megatron"] = measure(hf_to_megatron.main, ["--model", str(folder), "--save", str(megatron)])
    to_hf = ["--load", str(megatron), "--save", str(back), "--format", "llava_next"]
    runs["megatron_to_hf"] = measure(megatron_to_hf.main, to_hf)
    return {"parameters": parameters, "dtype": dtype, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--work", type=Path, help="folder for some 20 GB; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        found = compare(Path(work), ModelConfig(), args.dtype)
    rows = [
        [
            name,
            f"{run['seconds']:.1f}",
            *(f"{run.get(key, 0) / 2**30:.2f}" for key in ("at_start_bytes", "peak_anonymous_bytes")),
        ]
        for name, run in found["runs"].items()
    ]
    print(f"{found['parameters']:,} parameters, {found['dtype']}\n")
    print(report.table(["", "seconds", "GiB at start", "GiB at peak"], rows))
    print(f"\nwrote {report.save(report.RESULTS, 'convert', found)}")


if __name__ == "__main__":
    main()
