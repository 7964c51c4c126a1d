"""Runs the demo's steps in order. Steps that are finished are skipped, and interrupted training resumes.

What is finished is in `steps.json` in the output folder. A step runs again if its command, the files it reads or an
earlier step has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from progress import Estimate, ProgressBar, minutes

STEP_TIMEOUT = 3600
"""Seconds after which a command counts as hanging."""
TRACKER = "latest_checkpointed_iteration.txt"
"""In a folder of checkpoints, the iteration of the newest one."""


@dataclass
class Step:
    """Commands, and what they read and write."""

    name: str
    title: str
    commands: list[list[str]]
    """Arguments of Python."""
    inputs: list[Path]
    """Files that the commands read, other than the outputs of earlier steps."""
    outputs: list[Path]
    """Files and folders that they write."""
    weight: float
    """Seconds on two quiet cores."""
    threads: int = 1
    checkpoints: Path | None = None
    """Where a training step saves, and resumes from."""
    iterations: int = 0
    """Of a training step."""

    def key(self, previous: str) -> str:
        """Hash of all that the outputs follow from; `previous` is the key of the step before."""
        digest = hashlib.sha256(json.dumps([previous, self.commands]).encode())
        for path in self.inputs:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def share_done(self) -> float:
        """Share of a training step that its newest checkpoint has."""
        if self.checkpoints is None or not (self.checkpoints / TRACKER).is_file():
            return 0.0
        return min(1.0, int((self.checkpoints / TRACKER).read_text()) / self.iterations)


@dataclass
class Journal:
    """Which steps were started and finished, with which key."""

    path: Path
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Journal:
        return cls(path, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})

    def is_finished(self, step: Step, key: str) -> bool:
        """Whether the step was finished with this key, and its outputs are still there."""
        record = self.records.get(step.name, {})
        return record == record | {"key": key, "finished": True} and all(path.exists() for path in step.outputs)

    def start(self, step: Step, key: str) -> bool:
        """Note that the step starts. Returns whether it resumes; otherwise its old outputs are removed.

        Interrupted training resumes. Steps after one that starts from its beginning will do so, too.
        """
        if step.checkpoints is not None and self.records.get(step.name) == {"key": key, "finished": False}:
            return True
        for path in step.outputs:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        names = list(self.records)
        if step.name in names:
            self.records = {name: self.records[name] for name in names[: names.index(step.name)]}
        self.records[step.name] = {"key": key, "finished": False}
        self._write()
        return False

    def finish(self, step: Step, seconds: float, processor_seconds: float) -> None:
        """Note that the step is finished, and what it took."""
        times = {"seconds": round(seconds, 1), "processor_seconds": round(processor_seconds, 1)}
        self.records[step.name] |= {"finished": True, **times}
        self._write()

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.records, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def lock(folder: Path) -> IO[str]:
    """Hold the folder for this process and the commands it starts; exits if another demo has it.

    The commands inherit the lock: after a killed demo it is free when they have ended, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"demo: another one, or a command of one that was killed, is at work in {folder}. Wait for its end.")
    return file


class Runner:
    """Runs steps below one progress bar."""

    def __init__(self, root: Path, output: Path, steps: list[Step]) -> None:
        self.root, self.steps = root, steps
        self.lock = lock(output)
        self.journal = Journal.open(output / "steps.json")
        self.estimate = Estimate([step.weight for step in steps])
        self.bar = ProgressBar(self.estimate)

    def run(self) -> bool:
        """Run what is not finished; exits if a command fails. Returns whether there was anything to run."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("demo: ended by a signal; the same command resumes"))
        key, ran = "", False
        try:
            for number, step in enumerate(self.steps, 1):
                key = step.key(key)
                if not ran and self.journal.is_finished(step, key):
                    self.bar.print(f"== {number}. {step.title}: finished")
                    self.estimate.skip()
                else:
                    ran = True
                    self._run_step(number, step, key)
        except KeyboardInterrupt:
            sys.exit("demo: interrupted; the same command resumes")
        finally:
            self.bar.close()
        return ran

    def _run_step(self, number: int, step: Step, key: str) -> None:
        resumes = self.journal.start(step, key)
        if resumes:
            self.estimate.resume(step.share_done())
        self.bar.print(f"\n== {number}. {step.title}{' (resumed)' if resumes else ''}")
        started, processor = time.monotonic(), _processor_seconds()
        for command in step.commands:
            self._run_command(number, command, step.threads)
        self.estimate.finish()
        seconds, processor = time.monotonic() - started, _processor_seconds() - processor
        self.journal.finish(step, seconds, processor)
        self.bar.print(f"   {minutes(seconds)}, {processor:.0f} s of processor time")

    def _run_command(self, number: int, command: list[str], threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(self.root), "PYTHONUNBUFFERED": "1"}
        environment["OMP_NUM_THREADS"] = str(threads)
        process = subprocess.Popen(
            [sys.executable, *command], cwd=self.root, env=environment, pass_fds=[self.lock.fileno()],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        timer = threading.Timer(STEP_TIMEOUT, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                self.bar.print(line.rstrip())
            if process.wait():
                sys.exit(f"demo: step {number} failed, see above: python {' '.join(command)}")
        finally:
            timer.cancel()
            if process.poll() is None:  # interrupted: training saves, then ends
                process.terminate()
                process.wait()


def _processor_seconds() -> float:
    """Of all commands that have ended."""
    times = os.times()
    return times.children_user + times.children_system
