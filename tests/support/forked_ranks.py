"""Ranks without the seconds of their imports.

A process that has imported the trainer, and done nothing else, forks the ranks of each start. They run a module or a
script as `python` would, in processes of their own, with torchrun's environment variables.

    python -m tests.support.forked_ranks        reads starts from its input and answers, in JSON, one per line
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import random
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from tests.support.launch import (
    BUSY_MACHINE,
    OTHERS_END_SECONDS,
    ROOT,
    check_ranks,
    free_port,
    launch,
    rank_variables,
)

_PATIENCE_SECONDS = 30.0
"""That ranks have to end after SIGTERM, as torchrun's."""


def launch_forked(
    *command: str | Path, ranks: int, timeout: float, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """`launch` for commands that import megatron_vlm, with ranks of a process that all tests share.

    On a GPU they start afresh, because CUDA does not work in a fork of a process that has asked for it.
    """
    from megatron_vlm.runtime.device import on_gpu

    if on_gpu():
        return launch(*command, ranks=ranks, timeout=timeout, check=check)
    with tempfile.NamedTemporaryFile("r") as output:
        server = _shared()
        try:
            server.start_command(*command, ranks=ranks, log=Path(output.name), terminate=False)
            code = server.wait(BUSY_MACHINE * timeout)
        except TimeoutError:
            server.close()
            raise subprocess.TimeoutExpired(list(map(str, command)), timeout, output.read()) from None
        except BaseException:
            server.close()
            raise
        result = subprocess.CompletedProcess(list(map(str, command)), code, output.read())
    if check:
        check_ranks(result, ranks)
    return result


class ForkedRanks:
    """The client: one start at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked_ranks"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,  # so that it can be killed with its ranks and their workers
        )
        self.pids: list[int] = []

    def start(self, *arguments: str | Path, ranks: int, log: Path) -> list[int]:
        """Start ranks with the arguments of `megatron_vlm.train`, which end as torchrun's. See `start_command`."""
        return self.start_command("-m", "megatron_vlm.train", *arguments, ranks=ranks, log=log, terminate=True)

    def start_command(self, *command: str | Path, ranks: int, log: Path, terminate: bool) -> list[int]:
        """Start ranks of a script (or `-m`, module). Returns their process ids; output goes to the end of `log`.

        When one fails, with `terminate` the others get SIGTERM; without it they are killed soon, as by `launch`.
        """
        assert self._server.stdin is not None
        start = {
            "command": list(map(str, command)),
            "ranks": ranks,
            "log": str(log),
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            "terminate": terminate,
        }
        self._server.stdin.write(json.dumps(start) + "\n")
        self.pids = self._answer(300.0)
        return self.pids

    def wait(self, timeout: float) -> int:
        """Until all ranks have ended. Returns 0, or the exit code of the first that failed; -n if by signal n."""
        code = self._answer(timeout)
        self.pids = []
        assert isinstance(code, int)
        return code

    def has_ended(self) -> bool:
        return bool(select.select([self._server.stdout], [], [], 0)[0])

    def is_running(self) -> bool:
        """Whether it can start ranks."""
        return self._server.poll() is None

    def _answer(self, timeout: float) -> Any:
        output: IO[str] | None = self._server.stdout
        assert output is not None
        if not select.select([output], [], [], timeout)[0]:
            raise TimeoutError(f"ranks {self.pids} did not answer within {timeout:.0f} s")
        return json.loads(output.readline())

    def close(self) -> None:
        if self._server.returncode is None:  # so that the process id is still its own
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()


@functools.cache
def _servers() -> list[ForkedRanks]:
    """The one that all tests of this process share, once one has asked for it."""
    servers: list[ForkedRanks] = []
    atexit.register(lambda: [server.close() for server in servers])
    return servers


def _shared() -> ForkedRanks:
    servers = _servers()
    if not servers or not servers[0].is_running():
        servers[:] = [ForkedRanks()]
    return servers[0]


def _become_rank(start: dict[str, Any], rank: int, port: int) -> None:
    """In the child: what a process started afresh has of its own."""
    os.environ.clear()
    os.environ.update(start["environment"])
    if start["ranks"] > 1:
        os.environ.update(rank_variables(rank, start["ranks"], port))
    random.seed()
    tempfile.tempdir = None  # that of the environment variable, which may be another
    log = os.open(start["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def _run(command: list[str]) -> None:
    """In the child: `python COMMAND`."""
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


def _wait(pids: list[int], terminate: bool) -> int:
    """The exit code of the first rank that failed, after all have ended."""
    left, first, deadline = set(pids), 0, float("inf")
    while left:
        for pid in list(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            left.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not first:
                first = code
                deadline = time.monotonic() + (_PATIENCE_SECONDS if terminate else OTHERS_END_SECONDS)
                for other in left if terminate else ():
                    os.kill(other, signal.SIGTERM)
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return first


def main() -> None:
    import torch._dynamo  # noqa: F401  (the first optimizer of a process imports it)

    import megatron_vlm.runtime.agreement
    import megatron_vlm.training.trainer  # noqa: F401

    gc.collect()
    gc.freeze()  # what is imported is never garbage: the ranks do not look at it, which would copy its memory
    for line in sys.stdin:
        start, port = json.loads(line), free_port()
        pids = []
        for rank in range(start["ranks"]):
            pid = os.fork()
            if not pid:
                _become_rank(start, rank, port)
                return _run(start["command"])
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps(_wait(pids, start["terminate"])), flush=True)


if __name__ == "__main__":
    main()
