"""How long a conversion takes beside copying the same files, and how much memory it needs.

    python -m benchmarks.convert [--dtype float32 bfloat16] [--work DIR]

The model is Instella-VL-1B in size, 1,486,569,472 random parameters. Each run is in a process of its own. It starts
with no file waiting to be written and just after what it reads was read, and ends when all that it wrote is on the
disk: the file cache serves all of them alike. Memory is sampled as anonymous memory (RssAnon of /proc/self/status;
mapped files are not counted, the kernel drops them at will).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
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
from benchmarks.random_tokenizer import write_tokenizer
from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.megatron_to_hf import DTYPES
from megatron_vlm.config import ModelConfig

SAMPLE_SECONDS = 0.02


def anonymous_bytes() -> int:
    """Anonymous memory of this process that is resident, right now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this needs Linux")


def copy(arguments: list[str]) -> int:
    """`cp -r FOLDER TARGET`; the kernel copies, as it does for cp."""
    shutil.copytree(*arguments)
    return 0


def _read(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(2**24):
                    pass


def _measured(command: Callable[[list[str]], int], reads: Path, arguments: list[str], answer: Connection) -> None:
    peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    os.sync()
    _read(reads)
    at_start = anonymous_bytes()
    sampler.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    code = command(arguments)
    os.sync()
    found = {"exit": code, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    done.set()
    sampler.join()
    answer.send(found | {"peak_anonymous_bytes": max(peak, at_start), "at_start_bytes": at_start})


def measure(command: Callable[[list[str]], int], reads: Path, arguments: list[str]) -> dict[str, Any]:
    """Run a command's `main`, which `reads` a folder, in a process of its own: exit code, seconds, CPU seconds, memory
    at its peak and at its start."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(command, reads, arguments, theirs))
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


def compare(work: Path, model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Write a random folder into `work`, copy it, convert it there and back."""
    model.image_token_index = write_tokenizer(work / "words")
    folder, megatron, back = work / "folder", work / "megatron", work / "back"
    parameters = write_random_folder(folder, work / "words", model, DTYPES[dtype])
    runs = {"cp": measure(copy, folder, [str(folder), str(work / "copy")])}
    shutil.rmtree(work / "copy")
    runs["hf_to_megatron"] = measure(hf_to_megatron.main, folder, ["--model", str(folder), "--save", str(megatron)])
    to_hf = ["--load", str(megatron), "--save", str(back), "--format", "llava_next"]
    runs["megatron_to_hf"] = measure(megatron_to_hf.main, megatron, to_hf)
    return {"parameters": parameters, "runs": runs}


def table_of(runs: dict[str, dict[str, Any]]) -> str:
    """What `compare` found, one run a line."""
    header = ["", "seconds", "of cp's", "CPU seconds", "GiB at start", "GiB at peak"]
    rows = [
        [
            name,
            f"{run['seconds']:.1f}",
            f"{run['seconds'] / runs['cp']['seconds']:.2f} x",
            f"{run['cpu_seconds']:.1f}",
            *(f"{run[key] / 2**30:.2f}" for key in ("at_start_bytes", "peak_anonymous_bytes")),
        ]
        for name, run in runs.items()
    ]
    return report.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32", "bfloat16"], help="of the weights")
    parser.add_argument("--work", type=Path, help="folder for some 20 GB; default: a temporary one")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    found = {}
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            found[dtype] = compare(Path(work), ModelConfig(), dtype)
        print(f"\n{found[dtype]['parameters']:,} parameters, {dtype}\n\n{table_of(found[dtype]['runs'])}")
    print(f"\nwrote {report.save(args.output, 'convert', found)}")


if __name__ == "__main__":
    main()
