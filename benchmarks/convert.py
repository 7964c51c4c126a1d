"""Time and peak memory of checkpoint conversion, compared with copying the same files.

    python -m benchmarks.convert [--dtype float32 bfloat16] [--work DIR]

The model has the size of Instella-VL-1B: 1,486,569,472 random parameters. Each run has its own process. Before the
timer starts, the process calls sync and reads the input once; before it stops, the process calls sync again. So every
run finds the same page cache and writes everything to disk. Peak memory is sampled from RssAnon in /proc/self/status.
Mapped files are not counted, because the kernel can drop them at any time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.support import report
from benchmarks.support.own_process import run_in_own_process
from benchmarks.support.random_folder import write_random_folder
from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.megatron_to_hf import DTYPES
from megatron_vlm.config import ModelConfig

SAMPLE_SECONDS = 0.02


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; this benchmark needs Linux")


def copy(arguments: list[str]) -> int:
    """`cp -r FOLDER TARGET`; like cp, it lets the kernel copy the bytes."""
    source, target = arguments
    shutil.copytree(source, target)
    return 0


def _read(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.read(2**24):
                    pass


def _run_command(command: Callable[[list[str]], int], source: Path, arguments: list[str]) -> dict[str, Any]:
    peak, finished = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not finished.wait(SAMPLE_SECONDS):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    os.sync()
    _read(source)
    at_start = anonymous_bytes()
    sampler.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    code = command(arguments)
    os.sync()
    measured = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    finished.set()
    sampler.join()
    return measured | {"exit": code, "peak_anonymous_bytes": max(peak, at_start), "at_start_bytes": at_start}


def measure(command: Callable[[list[str]], int], source: Path, arguments: list[str]) -> dict[str, Any]:
    """Run a command's `main`, which reads the folder `source`, in its own process.

    Returns:
        exit (code), seconds, cpu_seconds, peak_anonymous_bytes, at_start_bytes.
    """
    measured: dict[str, Any] = run_in_own_process(_run_command, command, source, arguments, what=" ".join(arguments))
    if measured["exit"]:
        raise RuntimeError(f"{' '.join(arguments)} failed")
    return measured


def compare(work: Path, model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Write a random Hugging Face folder into `work`, copy it, convert it to Megatron and back."""
    model.image_token_index = write_tokenizer(work / "tokenizer")
    folder, megatron, back = work / "folder", work / "megatron", work / "back"
    parameters = write_random_folder(folder, work / "tokenizer", model, DTYPES[dtype])
    runs = {"cp": measure(copy, folder, [str(folder), str(work / "copy")])}
    shutil.rmtree(work / "copy")
    runs["hf_to_megatron"] = measure(hf_to_megatron.main, folder, ["--model", str(folder), "--save", str(megatron)])
    to_hf = ["--load", str(megatron), "--save", str(back), "--format", "llava_next"]
    runs["megatron_to_hf"] = measure(megatron_to_hf.main, megatron, to_hf)
    return {"parameters": parameters, "runs": runs}


def table_of(runs: dict[str, dict[str, Any]]) -> str:
    """Results of `compare` as a Markdown table, one run per line."""
    header = ["run", "seconds", "time / cp", "CPU seconds", "GiB at start", "peak GiB"]
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
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32", "bfloat16"], help="weights' dtypes")
    parser.add_argument("--work", type=Path, help="folder with about 20 GB free; default: a temporary one")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    results = {}
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            results[dtype] = compare(Path(work), ModelConfig(), dtype)
        print(f"\n{results[dtype]['parameters']:,} parameters, {dtype}\n\n{table_of(results[dtype]['runs'])}")
    print(f"\nwrote {report.save(args.output, 'convert', results)}")


if __name__ == "__main__":
    main()
