"""Scores of lmms-eval beside the published ones, and the script that runs all benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_vlm.commands.benchmark_table import BENCHMARKS, GENERAL, main
from tests.support.environments import LMMS_EVAL
from tests.support.launch import ROOT
from tests.support.published_source import download_wheel, read_from_wheel

SCRIPT = ROOT / "examples" / "instellavl" / "evaluate.sh"


def write_results(
    folder: Path, task: str, metric: str, value: object, date: str = "20260101_000000", asked: int = 50
) -> None:
    """A file as lmms-eval writes it, of a task with 50 questions."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {task: {"alias": task, f"{metric},none": value, f"{metric}_stderr,none": 0.1}}
    counts = {task: {"original": 50, "effective": asked}}
    (folder / f"{date}_results.json").write_text(json.dumps({"results": results, "n-samples": counts, "date": date}))


def printed(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, exit_code: int = 0) -> list[list[str]]:
    assert main([str(folder), *arguments]) == exit_code
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_published_means() -> None:
    for name, mean in {GENERAL: 62.62, "text, charts, documents": 67.50}.items():
        scores = [benchmark.published for benchmark in BENCHMARKS if benchmark.group == name]
        assert sum(scores) / len(scores) == pytest.approx(mean, abs=0.005)


def test_scores_and_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path / "gqa" / "old", "gqa", "exact_match", 0.1, date="20250101_000000")
    write_results(tmp_path / "gqa" / "model", "gqa", "exact_match", 0.6252)
    write_results(tmp_path / "mmbench", "mmbench_en_dev", "gpt_eval_score", 68.17)
    write_results(tmp_path / "pope", "pope", "pope_f1_score", 0.5, asked=7)
    lines = printed(tmp_path, capsys)
    assert ["gqa", "exact_match", "50", "62.52", "61.52", "+1.00"] in lines
    assert ["mmbench_en_dev", "gpt_eval_score", "50", "68.17", "69.17", "-1.00"] in lines
    assert ["pope", "pope_f1_score", "7*", "50.00", "86.73", "-36.73"] in lines
    assert ["mean", "of", "general", "-", "62.62"] in lines
    assert lines[-1][:4] == ["*", "not", "all", "questions:"]


def test_means_of_complete_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for benchmark in BENCHMARKS:
        write_results(tmp_path / benchmark.task, benchmark.task, benchmark.metric, 50 / benchmark.factor)
    assert ["mean", "of", "general", "50.00", "62.62", "-12.62"] in printed(tmp_path, capsys)


def test_missing_scores_and_files_that_are_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, "gqa", "exact_match", 0.5)
    assert main([str(tmp_path), "--tasks", "gqa,pope,chartqa"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path} has no score for pope, chartqa\n"
    write_results(tmp_path / "b", "gqa", "accuracy", 0.5)
    assert main([str(tmp_path)]) == 2
    assert "gqa has no exact_match, but alias, accuracy,none" in capsys.readouterr().err
    (tmp_path / "b" / "a_results.json").write_text("[]")
    assert main([str(tmp_path)]) == 2
    assert "a_results.json has no results of lmms-eval" in capsys.readouterr().err


class TaskLoader(yaml.SafeLoader):
    """Reads task files of lmms-eval without the functions that they name."""


TaskLoader.add_multi_constructor("!function", lambda *_: None)


@pytest.mark.full
def test_benchmarks_and_metrics_are_those_of_lmms_eval(tmp_path: Path) -> None:
    wheel = download_wheel(LMMS_EVAL, tmp_path)
    files = {name: yaml.load(text, TaskLoader) for name, text in read_from_wheel(wheel, "lmms_eval/tasks/", "yaml")}
    tasks = {}
    for name, content in files.items():
        included = files.get(f"{name.rpartition('/')[0]}/{content.get('include')}", {})
        metrics = content.get("metric_list") or included.get("metric_list") or []
        tasks[str(content.get("task"))] = [metric["metric"] for metric in metrics if metric]
    for benchmark in BENCHMARKS:
        assert benchmark.metric in tasks[benchmark.task], benchmark.task


# ---- evaluate.sh ----

STUB = """#!{python}
import json, sys
from pathlib import Path
arguments = sys.argv[1:]
with open("{calls}", "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
task, output = (arguments[arguments.index(name) + 1] for name in ("--tasks", "--output_path"))
if task == "gqa":
    from tests.evaluation.test_benchmark_table import write_results
    write_results(Path(output) / "model", task, "exact_match", 0.6152)
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with a stand-in for accelerate that answers one benchmark, and the command megatron-vlm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "accelerate").write_text(STUB.format(python=sys.executable, calls=tmp_path / "calls"))
    (folder / "megatron-vlm").write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron_vlm.cli "$@"\n')
    for program in folder.iterdir():
        program.chmod(0o755)
    return folder


def run_script(programs: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_the_script_runs_every_benchmark_once(programs: Path, tmp_path: Path) -> None:
    output = tmp_path / "logs"
    arguments = ("--model", tmp_path, "--output", output, "--tasks", "gqa,pope", "--processes", "2", "--limit", "8")
    done = run_script(programs, *arguments)
    assert (done.returncode, done.stderr) == (1, f"error: {output} has no score for pope\n")
    assert ["gqa", "exact_match", "50", "61.52", "61.52", "+0.00"] in list(map(str.split, done.stdout.splitlines()))
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[call.index("--tasks") + 1] for call in calls] == ["gqa", "pope"]
    published = f"pretrained={tmp_path},conv_template=instella,model_name=instellavl"
    assert calls[0] == [
        *("launch", "--num_processes=2", "-m", "lmms_eval", "--model", "instellavl", "--model_args", published),
        *("--tasks", "gqa", "--batch_size", "1", "--log_samples", "--log_samples_suffix", "instellavl"),
        *("--limit", "8", "--output_path", f"{output}/gqa"),
    ]
    assert run_script(programs, *arguments).stdout.startswith("gqa: has results in ")
    assert len((tmp_path / "calls").read_text().splitlines()) == 3, "gqa was evaluated again"


def test_arguments_of_the_script(programs: Path, tmp_path: Path) -> None:
    shown = run_script(programs, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    for benchmark in BENCHMARKS:
        assert benchmark.task in shown.stdout
    for arguments, message in {
        (): "--model is missing",
        ("--model", tmp_path): "--output is missing",
        ("--model", "nowhere", "--output", "x"): "--model nowhere is not a folder",
        ("--model",): "--model needs a value",
        ("--colour", "red"): "unknown argument --colour",
    }.items():
        done = run_script(programs, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(f"evaluate.sh: {message}")
    assert not (tmp_path / "calls").exists()
