"""The launch scripts, with stubs in place of Slurm and of the agents."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import load_recipe, parse_command_line
from tests.examples.conftest import EXAMPLES
from tests.support.launch import ROOT

SCRIPTS = ("launch_common.sh", "launch_torchrun.sh", "launch_slurm.sh")
STAGES = ("warmup", "pretrain", "instruct")
STUB = f"""#!{sys.executable}
import json, os, signal, subprocess, sys, time
from pathlib import Path
folder, arguments = Path(os.environ["STUBS"]), sys.argv[1:]
name = Path(sys.argv[0]).name
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps([name, *arguments]) + "\\n")
if name == "scontrol" and arguments[1:2] == ["hostnames"]:
    print("node7\\nnode8")
elif name == "scontrol" and arguments[1:2] == ["job"]:
    print("JobId=11 JobState=" + os.environ["JOB_STATE"] + " Reason=None")
elif name == "srun":
    agent = arguments[arguments.index("bash"):]
    sys.exit(subprocess.run(agent, env={{**os.environ, "SLURM_NODEID": "0"}}).returncode)
elif name == "python":
    plan = json.loads((folder / "plan").read_text())
    step = plan.pop(0)
    (folder / "plan").write_text(json.dumps(plan))
    if "saved" in step:
        save = Path(arguments[arguments.index("--save") + 1])
        save.mkdir(parents=True, exist_ok=True)
        (save / "latest_checkpointed_iteration.txt").write_text(str(step["saved"]))
    if "waits" in step:
        def stop(number, frame):
            (folder / "signal").write_text(signal.Signals(number).name)
            sys.exit(128 + number)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, stop)
        (folder / "ready").touch()
        time.sleep(60)
    sys.exit(step["code"])
"""


@dataclass
class Stubs:
    """Programs that write down how they were called; `python` ends as planned."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("python", "srun", "scontrol"):
            (self.folder / "bin").mkdir(parents=True, exist_ok=True)
            (self.folder / "bin" / name).write_text(STUB)
            (self.folder / "bin" / name).chmod(0o755)
        self.environment |= {"PATH": f"{self.folder / 'bin'}:/bin:/usr/bin", "STUBS": str(self.folder)}

    def plan(self, *steps: dict[str, Any]) -> None:
        """What the agents do, one start after the other: `code`, and `saved`, the iteration of a new checkpoint."""
        (self.folder / "plan").write_text(json.dumps(steps))

    def calls(self, name: str) -> list[list[str]]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == name]

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(EXAMPLES / script), *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60)

    def torchrun(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(
            "launch_torchrun.sh", "--data-root", "/data", "--checkpoints", str(self.folder / "ckpt"), *arguments
        )

    def slurm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A start of a job that was submitted in a folder with the examples."""
        submitted = self.folder / "submitted"
        if not submitted.exists():
            submitted.mkdir()
            (submitted / "examples").symlink_to(ROOT / "examples")
        self.environment |= {
            "SLURM_JOB_ID": "11", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_SUBMIT_DIR": str(submitted), "JOB_STATE": self.environment.get("JOB_STATE", "RUNNING"),
        }  # fmt: skip
        flags = ("--data-root", "/data", "--stage", "pretrain", "--checkpoints", str(self.folder / "ckpt"))
        return self.run("launch_slurm.sh", *flags, *arguments)

    def was_requeued(self) -> bool:
        return ["requeue", "11"] in self.calls("scontrol")


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path)


def of_training(call: list[str]) -> list[str]:
    """The trainer's arguments of an agent's."""
    return call[call.index("megatron_vlm.train") + 1 :]


def test_shellcheck_is_content() -> None:
    shellcheck, scripts = Path(sys.executable).parent / "shellcheck", [EXAMPLES / script for script in SCRIPTS]
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS[1:])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data-root is missing"),
        (("--data-root",), "--data-root needs a value"),
        (("--data-root", "--stage", "warmup"), "--data-root needs a value"),
        (("--data-root", "/d", "--gpus", "eight"), "--gpus is eight"),
        (("/d",), "unknown argument /d; settings of the trainer come after --"),
        (("--data-root", "/d", "--stage", "stage1"), "known are warmup, pretrain and instruct"),
        (("--data-root", "/d", "--stage", "warmup", "--recipes", "nowhere"), "nowhere/warmup.yaml does not exist"),
    ],
)
def test_wrong_arguments_are_named(stubs: Stubs, script: str, arguments: tuple[str, ...], message: str) -> None:
    stubs.environment["SLURM_JOB_ID"] = "11"
    done = stubs.run(script, *arguments)
    assert done.returncode == 2 and message in done.stderr and "See --help" in done.stderr
    assert not stubs.calls("python") and not stubs.calls("srun")


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_help_names_every_argument(stubs: Stubs, script: str) -> None:
    done = stubs.run(script, "--help")
    assert done.returncode == 0
    for line in (EXAMPLES / script).read_text().splitlines():
        if line.startswith("        --") and ")" in line:
            assert line.split(")")[0].split("|")[0].strip() in done.stdout


def test_arguments_outside_a_repository_or_a_job_are_named(stubs: Stubs) -> None:
    done = stubs.run("launch_slurm.sh", "--data-root", "/d", "--stage", "warmup")
    assert done.returncode == 2 and "start it with sbatch" in done.stderr
    stubs.environment["SLURM_SUBMIT_DIR"] = str(stubs.folder)
    done = stubs.run("launch_slurm.sh", "--data-root", "/d", "--stage", "warmup")
    assert done.returncode == 2 and "submit it in the root of the repository" in done.stderr
    for flags, message in ((("--nodes", "2"), "need --rendezvous"), (("--nodes", "2-4"), "neither N nor MIN:MAX")):
        done = stubs.torchrun(*flags)
        assert done.returncode == 2 and message in done.stderr


def test_defaults_are_those_of_the_recipes(stubs: Stubs) -> None:
    """Three stages in order; without --checkpoints, folders are those that the recipes name."""
    stubs.plan(*[{"code": 0}] * 3)
    assert stubs.run("launch_torchrun.sh", "--data-root", "/data").returncode == 0
    for stage, call in zip(STAGES, stubs.calls("python"), strict=True):
        assert call[: call.index("-m", 2)] == [
            "-m", "megatron_vlm.launch", "--standalone", "--rdzv-id", f"instellavl-{stage}", "--nproc-per-node", "8",
            "--max-restarts", "3",
        ]  # fmt: skip
        recipe, _ = parse_command_line(of_training(call))
        written = load_recipe(EXAMPLES / f"{stage}.yaml")
        assert recipe.training == written.training and recipe.data.tokenizer_model == written.data.tokenizer_model
        assert recipe.data.data_root == "/data"


def test_several_nodes_meet_and_settings_are_passed_on(stubs: Stubs) -> None:
    stubs.plan({"code": 0})
    flags = ("--stage", "instruct", "--nodes", "2:4", "--rendezvous", "head:29500", "--run-name", "mine", "--gpus", "4")
    assert stubs.torchrun(*flags, "--", "--train-iters", "7").returncode == 0
    (call,) = stubs.calls("python")
    for flag, value in {
        "--nnodes": "2:4", "--rdzv-backend": "c10d", "--rdzv-endpoint": "head:29500", "--rdzv-id": "mine-instruct",
        "--nproc-per-node": "4", "--save": f"{stubs.folder}/ckpt/instruct", "--train-iters": "7",
        "--pretrained-checkpoint": f"{stubs.folder}/ckpt/pretrain",
    }.items():  # fmt: skip
        assert call[call.index(flag) + 1] == value


def test_an_agent_is_started_again_until_it_finishes(stubs: Stubs) -> None:
    """75 is no failure; failures with a newer checkpoint in between are not in a row."""
    failures = [{"code": 1}, {"code": 137}, {"code": 1, "saved": 30}, {"code": 1}, {"code": 75, "saved": 40}]
    stubs.plan(*failures, {"code": 143}, {"code": 1}, {"code": 0})
    done = stubs.torchrun("--stage", "warmup")
    assert done.returncode == 0, done.stderr
    assert len(stubs.calls("python")) == 8 and done.stderr.count("starting again from the newest checkpoint") == 7


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([2], "not started again"),
        ([1, 2], "not started again"),
        ([127], "Exit code 127 is not the trainer's"),
        ([1, 139, 1], "3 starts in a row failed without a newer checkpoint, the last with exit code 1"),
    ],
)
def test_what_does_not_help_is_not_tried_again(stubs: Stubs, codes: list[int], message: str) -> None:
    stubs.plan(*({"code": code} for code in codes), {"code": 0})
    done = stubs.torchrun()
    assert done.returncode == codes[-1] and message in done.stderr
    assert len(stubs.calls("python")) == len(codes)


@pytest.mark.parametrize(("sent", "received"), [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGINT", "SIGTERM")])
def test_signals_reach_the_agent_and_end_the_script(stubs: Stubs, sent: str, received: str) -> None:
    stubs.plan({"waits": True, "code": 0}, {"code": 0})
    command = ["bash", str(EXAMPLES / "launch_torchrun.sh"), "--data-root", "/data"]
    script = subprocess.Popen(command, cwd=ROOT, env=stubs.environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (stubs.folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    script.send_signal(signal.Signals[sent])
    _, errors = script.communicate(timeout=30)
    assert (stubs.folder / "signal").read_text() == received
    assert script.returncode == 128 + signal.Signals[received] and "the same command resumes" in errors
    assert len(stubs.calls("python")) == 1


def test_slurm_starts_one_agent_per_node(stubs: Stubs) -> None:
    stubs.plan({"code": 0})
    assert stubs.slurm("--", "--lr", "2e-5").returncode == 0
    (call,), (agent,) = stubs.calls("srun"), stubs.calls("python")
    assert call[call.index("--ntasks-per-node") + 1] == "1" and "--kill-on-bad-exit=0" in call
    for flag, value in {
        "--rdzv-conf": "is_host=1", "--nnodes": "2", "--nproc-per-node": "8", "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "node7:29500", "--rdzv-id": "11", "--lr": "2e-5",
    }.items():  # fmt: skip
        assert agent[agent.index(flag) + 1] == value
    parse_command_line(of_training(agent))
    assert not stubs.was_requeued()


def test_slurm_continues_with_fewer_nodes_if_asked_to(stubs: Stubs) -> None:
    stubs.plan({"code": 0})
    assert stubs.slurm("--min-nodes", "1").returncode == 0
    (call,), (agent,) = stubs.calls("srun"), stubs.calls("python")
    assert "--no-kill" in call and agent[agent.index("--nnodes") + 1] == "1:2"
    assert "has 2 nodes" in stubs.slurm("--min-nodes", "3").stderr


@pytest.mark.parametrize("code", [75, 1, 137, 138, 143])
def test_slurm_requeues(stubs: Stubs, code: int) -> None:
    stubs.plan({"code": code})
    assert stubs.slurm().returncode == 0 and stubs.was_requeued()


@pytest.mark.parametrize("code", [0, 2, 127])
def test_slurm_does_not_requeue(stubs: Stubs, code: int) -> None:
    stubs.plan({"code": code})
    assert stubs.slurm().returncode == code and not stubs.was_requeued()


def test_slurm_does_not_requeue_a_cancelled_job(stubs: Stubs) -> None:
    stubs.environment["JOB_STATE"] = "CANCELLED"
    stubs.plan({"code": 143})
    done = stubs.slurm()
    assert done.returncode == 143 and not stubs.was_requeued() and "was cancelled" in done.stderr


def test_slurm_counts_failures_across_starts(stubs: Stubs) -> None:
    stubs.plan({"code": 1}, {"code": 1, "saved": 10}, {"code": 1}, {"code": 75}, *[{"code": 137}] * 3, {"code": 0})
    codes = [stubs.slurm().returncode for _ in range(7)]
    assert codes == [0] * 6 + [137]
    assert stubs.calls("scontrol").count(["requeue", "11"]) == 6
    assert stubs.slurm().returncode == 0 and not list((stubs.folder / "submitted").glob("slurm-*"))


def test_slurm_reads_its_flags_before_the_first_command() -> None:
    """sbatch stops reading #SBATCH lines there; five minutes are what ranks get to save."""
    lines = (EXAMPLES / "launch_slurm.sh").read_text().splitlines()
    flags = [line.removeprefix("#SBATCH ") for line in lines[: lines.index("set -euo pipefail")] if "#SBATCH" in line]
    assert {"--signal USR1@300", "--requeue", "--open-mode append", "--ntasks-per-node 1"} <= set(flags)
    assert os.access(EXAMPLES / "launch_slurm.sh", os.X_OK)
