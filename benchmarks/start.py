"""Seconds and memory of the ranks of a job when they open a large annotation file: the first start, and a second one.

    python -m benchmarks.start

The file has conversations of two turns on images of a small folder. One entry of a hundred is unusable: half of those
for a missing image, half for an empty answer. All ranks start at once and share the disk, as the first ranks of several
machines do: one scans, measures and plans, and the others wait for its files. Seconds are those of the last rank.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.support.random_tokenizer import write_tokenizer
from benchmarks.support.report import RESULTS, save, table
from megatron_vlm.config import DataConfig, ModelConfig, Recipe
from megatron_vlm.data.planned_data import plan_data

STARTS = ("first start", "second start")
_IMAGES = 1_000
_ONE_UNUSABLE_IN = 100
_WORDS = ["the", "a", "red", "blue", "circle", "square", "image", "shows", "of", "is", "there", "colour", "what", "how"]
_WORDS_PER_SAMPLE = 70
_SIDES = (200, 1100)
_JOBS = multiprocessing.get_context("spawn")


def write_data(folder: Path, entries: int, seed: int = 0) -> Path:
    """Write `train.json`, images and a tokenizer below `folder`. Returns the annotation file."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    for number in range(min(_IMAGES, entries)):
        width, height = rng.integers(*_SIDES, 2).tolist()
        stream = io.BytesIO()
        Image.new("RGB", (width, height)).save(stream, "JPEG")
        (folder / "images" / f"{number}.jpg").write_bytes(stream.getvalue())
    write_tokenizer(folder / "tokenizer")
    path = folder / "train.json"
    with path.open("w") as file:
        for number, entry in enumerate(_entries(entries, rng)):
            file.write(("[" if not number else ",\n") + json.dumps(entry))
        file.write("]")
    return path


def _entries(count: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for number in range(count):
        words = [_WORDS[word] for word in rng.integers(0, len(_WORDS), _WORDS_PER_SAMPLE).tolist()]
        half = len(words) // 2
        answer, image = " ".join(words[half:]), f"{number % _IMAGES}.jpg"
        if number % _ONE_UNUSABLE_IN == 0:
            answer, image = (answer, f"missing-{number}.jpg") if number // _ONE_UNUSABLE_IN % 2 else ("", image)
        turns = [
            {"from": "human", "value": "<image>\n" + " ".join(words[:half])},
            {"from": "gpt", "value": answer},
        ]
        yield {"id": f"sample-{number:08d}", "image": image, "conversations": turns}


def start_ranks(annotations: Path, ranks: int) -> dict[str, Any]:
    """Start `ranks` processes at once that each open and plan the data. Returns seconds, CPU seconds and memory."""
    barrier, results = _JOBS.Barrier(ranks), _JOBS.SimpleQueue()
    processes = [_JOBS.Process(target=_start, args=(annotations, barrier, results)) for _ in range(ranks)]
    for process in processes:
        process.start()
    measured: list[dict[str, Any]] = []
    while len(measured) < ranks:
        if results.empty():
            if any(process.exitcode for process in processes):
                raise RuntimeError("a rank failed, see above")
            time.sleep(0.05)
        else:
            measured.append(results.get())
    for process in processes:
        process.join()
    if len({result["plan"] for result in measured}) != 1:
        raise RuntimeError("the ranks have different plans")
    return {
        "seconds": max(result["seconds"] for result in measured),
        "cpu_seconds": sum(result["cpu_seconds"] for result in measured),
        "rank_bytes": max(result["bytes"] for result in measured),
        "usable": measured[0]["usable"],
        "plan": measured[0]["plan"],
    }


def _start(annotations: Path, barrier: Any, results: Any) -> None:
    """One rank. Its memory is what it grows by at most, modules and memory-mapped files that it reads included."""
    folder = annotations.parent
    data = DataConfig(
        data_path=[str(annotations)], image_folder=str(folder / "images"), tokenizer_model=str(folder / "tokenizer"),
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    recipe = Recipe(model=ModelConfig(), data=data)
    before = _peak_bytes()
    barrier.wait()
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    planned = plan_data(recipe, is_logging_rank=False)
    results.put(
        {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": _cpu_seconds() - cpu_started,
            "bytes": _peak_bytes() - before,
            "usable": planned.dataset.counts["usable"],
            "plan": planned.plan.current.fingerprint(),
        }
    )


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of start.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        annotations = write_data(Path(folder, "data"), options.entries)
        size = annotations.stat().st_size
        starts = {name: start_ranks(annotations, options.ranks) for name in STARTS}
    content = {"entries": options.entries, "ranks": options.ranks, "file_bytes": size, "starts": starts}
    print(f"{options.entries:,} entries, {size / 1e6:,.0f} MB, {options.ranks} ranks")
    rows = [
        [name, f"{found['seconds']:.1f}", f"{found['cpu_seconds']:.1f}", f"{found['rank_bytes'] / 1e6:.0f}"]
        for name, found in starts.items()
    ]
    print(table(["", "seconds", "CPU seconds of all ranks", "MB of the largest rank"], rows))
    save(options.output, "start", content)


if __name__ == "__main__":
    main()
