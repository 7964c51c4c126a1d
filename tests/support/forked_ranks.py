"""Ranks of `megatron_vlm.train` without the seconds of their imports, for tests that start many.

A process that has imported the trainer, and done nothing else, forks the ranks of each start. They are processes as
torchrun's, with the same environment variables, and end as its do: when one fails, the others get SIGTERM.

    python -m tests.support.forked_ranks        reads starts from its input and answers, in JSON, one per line
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from tests.support.launch import ROOT

_PATIENCE_SECONDS = 30.0
"""That ranks have to end after SIGTERM, as torchrun's."""


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
        )
        self.pids: list[int] = []

    def start(self, *arguments: str | Path, ranks: int, log: Path) -> list[int]:
        """Start ranks with the arguments of `megatron_vlm.train`. Returns their process ids; output goes to `log`."""
        assert self._server.stdin is not None
        start = {"arguments": list(map(str, arguments)), "ranks": ranks, "log": str(log)}
        self._server.stdin.write(json.dumps(start) + "\n")
        self.pids = self._answer(120.0)
        return self.pids

    def wait(self, timeout: float) -> int:
        """Until all ranks have ended. Returns 0, or the exit code of the first that failed; -n if by signal n."""
        code = self._answer(timeout)
        self.pids = []
        assert isinstance(code, int)
        return code

    def has_ended(self) -> bool:
        return bool(select.select([self._server.stdout], [], [], 0)[0])

    def _answer(self, timeout: float) -> Any:
        output: IO[str] | None = self._server.stdout
        assert output is not None
        if not select.select([output], [], [], timeout)[0]:
            raise TimeoutError(f"ranks {self.pids} did not answer within {timeout:.0f} s")
        return json.loads(output.readline())

    def close(self) -> None:
        for pid in self.pids:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        self._server.kill()
        self._server.communicate()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _become_rank(start: dict[str, Any], rank: int, port: int) -> list[str]:
    """In the child: what torchrun sets. Returns the arguments."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(start["ranks"]),
        "LOCAL_WORLD_SIZE": str(start["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    log = os.open(start["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return list(start["arguments"])


def _wait(pids: list[int]) -> int:
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
                first, deadline = code, time.monotonic() + _PATIENCE_SECONDS
                for other in left:
                    os.kill(other, signal.SIGTERM)
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return first


def main() -> int:
    import megatron_vlm.runtime.agreement
    import megatron_vlm.training.trainer  # noqa: F401
    from megatron_vlm import train

    for line in sys.stdin:
        start, port = json.loads(line), _free_port()
        pids = []
        for rank in range(start["ranks"]):
            pid = os.fork()
            if not pid:
                return train.main(_become_rank(start, rank, port))
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps(_wait(pids)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
