"""Scores of lmms-eval beside the published scores of Instella-VL-1B.

megatron-vlm benchmark-table logs/

The folder is lmms-eval's --output_path; of several results for a benchmark, the newest counts. Scores are in percent.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of the published table."""

    group: str
    task: str
    """Name in lmms-eval."""
    metric: str
    """Key of the task's score in lmms-eval."""
    published: float
    """Score of Instella-VL-1B in percent."""
    factor: float = 100.0
    """From lmms-eval's score to percent."""


GENERAL, TEXT = "general", "text, charts, documents"
BENCHMARKS = (
    Benchmark(GENERAL, "gqa", "exact_match", 61.52),
    Benchmark(GENERAL, "scienceqa_img", "exact_match", 83.74),
    Benchmark(GENERAL, "pope", "pope_f1_score", 86.73),
    Benchmark(GENERAL, "mmbench_en_dev", "gpt_eval_score", 69.17, factor=1.0),
    Benchmark(GENERAL, "seedbench", "seed_image", 68.47),
    Benchmark(GENERAL, "mmmu_val", "mmmu_acc", 29.30),
    Benchmark(GENERAL, "realworldqa", "exact_match", 58.82),
    Benchmark(GENERAL, "mmstar", "average", 43.21),
    Benchmark(TEXT, "ocrbench", "ocrbench_accuracy", 67.90),
    Benchmark(TEXT, "textvqa_val", "exact_match", 71.23),
    Benchmark(TEXT, "ai2d", "exact_match", 66.65),
    Benchmark(TEXT, "chartqa", "relaxed_overall", 72.52),
    Benchmark(TEXT, "docvqa_val", "anls", 80.30),
    Benchmark(TEXT, "infovqa_val", "anls", 46.40),
)


@dataclass(frozen=True)
class Score:
    """A score that was found."""

    percent: float
    questions: int
    complete: bool
    """Whether all questions of the benchmark were asked."""


class ResultError(ValueError):
    """A file of results that cannot be read."""


def read_scores(folder: Path) -> dict[str, Score]:
    """Task -> newest score in the results below a folder.

    Raises ResultError if there is none, for a file that is not lmms-eval's, or a task of the table without its metric.
    """
    results: list[tuple[str, Path, Any]] = []
    files = list(folder.rglob("*results.json"))
    if not files:
        raise ResultError(f"{folder} holds no *results.json: give the --output_path of lmms-eval")
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            results.append((str(content["date"]), file, content))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ResultError(f"{file} has no results of lmms-eval: remove it, or evaluate again") from error
    scores: dict[str, Score] = {}
    for _, file, content in sorted(results, key=lambda result: result[0]):
        for benchmark in BENCHMARKS:
            if benchmark.task in content["results"]:
                scores[benchmark.task] = _score(benchmark, content, file)
    return scores


def _score(benchmark: Benchmark, content: Mapping[str, Any], file: Path) -> Score:
    found = content["results"][benchmark.task]
    # The part after the comma names a filter of answers; these tasks have one.
    values = [value for key, value in found.items() if key.partition(",")[0] == benchmark.metric]
    if len(values) != 1 or not isinstance(values[0], int | float):
        raise ResultError(f"{file}: {benchmark.task} has no {benchmark.metric}, but {', '.join(found)}")
    asked = content["n-samples"][benchmark.task]
    return Score(benchmark.factor * values[0], asked["effective"], asked["effective"] == asked["original"])


def table(scores: Mapping[str, Score]) -> list[str]:
    """Lines: each benchmark, and after each group the mean, if all of the group were evaluated."""
    lines = [f"{'benchmark':<16}{'metric':<19}{'questions':>9}{'score':>8}{'published':>11}{'difference':>12}"]
    for group in (GENERAL, TEXT):
        members = [benchmark for benchmark in BENCHMARKS if benchmark.group == group]
        for benchmark in members:
            score = scores.get(benchmark.task)
            start = f"{benchmark.task:<16}{benchmark.metric:<19}"
            if score is None:
                lines.append(f"{start}{'-':>9}{'-':>8}{benchmark.published:>11.2f}")
                continue
            asked = f"{score.questions}{'' if score.complete else '*'}"
            lines.append(f"{start}{asked:>9}{_compared(score.percent, benchmark.published)}")
        published = _mean(benchmark.published for benchmark in members)
        if all(benchmark.task in scores for benchmark in members):
            mean = _mean(scores[benchmark.task].percent for benchmark in members)
            lines.append(f"{f'mean of {group}':<44}{_compared(mean, published)}")
        else:
            lines.append(f"{f'mean of {group}':<44}{'-':>8}{published:>11.2f}")
    if any(not score.complete for score in scores.values()):
        lines.append("* not all questions: no comparison with the published score")
    return lines


def _compared(score: float, published: float) -> str:
    difference = round(score - published, 2) or 0.0  # no -0.00
    return f"{score:>8.2f}{published:>11.2f}{difference:>+12.2f}"


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code: 0; 1 if a benchmark of --tasks has no score; 2 if results cannot be read."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="lmms-eval's --output_path")
    parser.add_argument("--tasks", help="benchmarks that must have a score, separated by commas")
    args = parser.parse_args(argv)
    try:
        scores = read_scores(args.folder)
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(scores)))
    missing = [task for task in (args.tasks or "").split(",") if task and task not in scores]
    if missing:
        print(f"error: {args.folder} has no score for {', '.join(missing)}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
