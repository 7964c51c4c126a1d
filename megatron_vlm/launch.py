"""`python -m megatron_vlm.launch [TORCHRUN'S FLAGS] -m megatron_vlm.train ...`: torchrun that a scheduler understands.

It is torchrun with two differences. Its exit code is that of the ranks (`runtime/exit_codes.py`) where torchrun's is
always 1. SIGUSR1, which Slurm sends before the time limit, reaches the ranks, and they have five minutes to save after
it or SIGTERM; torchrun would die of the first and kill them 30 seconds after the second.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, parse_args, run

from megatron_vlm.runtime.exit_codes import FAILED, FINISHED

_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
_SHUTDOWN_SECONDS = 300
_SIGNALLED = 128
"""Added to a signal's number, as shells do."""


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
        ended this process after its ranks.
    """
    args = parse_args([*_flags(), *(sys.argv[1:] if arguments is None else arguments)])
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} ended first, with exit code {failure.exitcode}", file=sys.stderr)
        return int(failure.exitcode) if failure.exitcode > 0 else FAILED
    except SignalException as received:
        print(f"{received.sigval.name} was passed on to the ranks, which have ended", file=sys.stderr)
        return _SIGNALLED + int(received.sigval)
    return FINISHED


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until torchrun handles it
    sys.exit(main())
