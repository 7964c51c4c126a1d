"""`python -m megatron_vlm.launch [TORCHRUN'S FLAGS] -m megatron_vlm.train ...`: torchrun that a scheduler understands.

It is torchrun with these differences. Its exit code is that of the ranks (`runtime/exit_codes.py`) where torchrun's is
always 1. Ranks that saved and stopped, or were given wrong settings, are not restarted, whatever `--max-restarts` says.
SIGUSR1, which Slurm sends before the time limit, reaches the ranks. They have five minutes to save after it, after
SIGTERM, and when another node joins; torchrun would die of the first and kill them 30 seconds after the others.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api as launcher_api
from torch.distributed.run import get_args_parser, parse_args, run

from megatron_vlm.runtime.exit_codes import FAILED, FINISHED, SAVED, WRONG_SETTINGS

_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
_SHUTDOWN_SECONDS = 300
_SIGNALLED = 128
"""Added to a signal's number, as shells do."""


class _Agent(LocalElasticAgent):
    """torch's agent of one node. It restarts ranks after a failure, and when a node joins."""

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            codes = {failure.exitcode for failure in result.failures.values()}
            # Ranks also save and stop when another agent saw a node that waits to join, before this one did.
            joined = SAVED in codes and worker_group.spec.rdzv_handler.num_nodes_waiting() > 0
            if codes & {SAVED, WRONG_SETTINGS}:
                self._remaining_restarts = 1 + self._remaining_restarts if joined else 0
        return result

    def _shutdown(self, *args: Any, **options: Any) -> None:
        joins = self._worker_group.state == WorkerState.HEALTHY  # no rank has failed: a node waits to join
        if joins and not args and hasattr(self, "_shutdown_timeout"):  # torch before 2.9 has none
            options.setdefault("timeout", _SHUTDOWN_SECONDS)
        super()._shutdown(*args, **options)


def _flags() -> list[str]:
    known = get_args_parser()._option_string_actions  # torch before 2.9 has neither
    wanted = {"--signals-to-handle": ",".join(_SIGNALS), "--shutdown-timeout": str(_SHUTDOWN_SECONDS)}
    return [f"{flag}={value}" for flag, value in wanted.items() if flag in known]


def main(arguments: list[str] | None = None) -> int:
    """Start the ranks of this node and wait for them.

    Args:
        arguments: torchrun's; those of the process by default.

    Returns:
        0 if all ranks finished; otherwise the exit code of the rank that ended first; 128 + the number of a signal that
        ended this process after its ranks; 1 if the other nodes cannot be reached.
    """
    args = parse_args([*_flags(), *(sys.argv[1:] if arguments is None else arguments)])
    launcher_api.LocalElasticAgent = _Agent  # type: ignore[misc]
    if args.nnodes not in ("1", "1:1"):
        # A node that joins a later round waits for the address of the store that agents share, which torch announces in
        # the first round only (2.13). Without sharing, it is announced in each.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} ended first, with exit code {failure.exitcode}", file=sys.stderr)
        return int(failure.exitcode) if failure.exitcode > 0 else FAILED
    except SignalException as received:
        print(f"{received.sigval.name} was passed on to the ranks, which have ended", file=sys.stderr)
        return _SIGNALLED + int(received.sigval)
    except RendezvousError as error:
        print(
            f"the nodes of this job did not meet at {args.rdzv_endpoint} ({type(error).__name__}: {error}). Is the "
            "first node running and reachable there, do all nodes give the same --rdzv-id, and do enough start?",
            file=sys.stderr,
        )
        return FAILED
    return FINISHED


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until torchrun handles it
    sys.exit(main())
