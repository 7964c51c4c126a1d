"""Start the ranks of a test with a timeout; show their output if they fail."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
BUSY_MACHINE = 3.0
"""Ranks may take so many times their timeout, which is for a machine with nothing else to do."""
OTHERS_END_SECONDS = 0.3
"""After one rank failed, before the others are killed."""
_PORTS = range(20_000, 29_000)
"""Below those that Linux gives to sockets which ask for any: every process group opens some of these."""


def launch(*command: str | Path, ranks: int, timeout: float, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script (or `-m`, module) on `ranks` processes of this machine.

    They get the environment that torchrun would give them, without its process, which takes as long to start as a rank.
    The return code is that of the rank that failed first.

    Raises:
        subprocess.TimeoutExpired: they did not end in time, and were killed.
        AssertionError: with `check`, one failed; the message ends with what they printed.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        processes = [_start(command, rank, ranks, port, output) for port in [free_port()] for rank in range(ranks)]
        try:
            code = _wait(processes, started + BUSY_MACHINE * timeout)
        except TimeoutError:
            output.seek(0)
            raise subprocess.TimeoutExpired(list(map(str, command)), timeout, output.read()) from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        output.seek(0)
        result = subprocess.CompletedProcess(list(map(str, command)), code, output.read())
    if check:
        check_ranks(result, ranks)
    return result


def check_ranks(result: subprocess.CompletedProcess[str], ranks: int) -> None:
    """Raise an AssertionError with the end of their output if a rank failed."""
    if result.returncode:
        raise AssertionError(f"{' '.join(result.args)} on {ranks} ranks failed:\n{result.stdout[-6000:]}")


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment variables by which one of several processes knows its rank, as torchrun sets them."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    values = dict(zip(names, map(str, (rank, rank, ranks, ranks, port)), strict=True))
    return values | {"MASTER_ADDR": "127.0.0.1"}


def _start(
    command: tuple[str | Path, ...], rank: int, ranks: int, port: int, output: object
) -> subprocess.Popen[bytes]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    if ranks > 1:
        environment |= rank_variables(rank, ranks, port)
    arguments = [sys.executable, *map(str, command)]
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)  # type: ignore[call-overload,no-any-return]


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> int:
    code = 0
    while any(process.poll() is None for process in processes):
        failed = next((process.returncode for process in processes if process.returncode), 0)
        if failed and not code:
            code, deadline = failed, min(deadline, time.monotonic() + OTHERS_END_SECONDS)
        if time.monotonic() > deadline:
            if code:
                return code
            raise TimeoutError
        time.sleep(0.02)
    return code or next((process.returncode for process in processes if process.returncode), 0)


def kill_tree(pid: int) -> None:
    """Kill a process that a test started, and all that it started, if any of them is left."""
    with suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            process.kill()


def free_port() -> int:
    """A port on which ranks can meet, still free when they have started, seconds later."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
