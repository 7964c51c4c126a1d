"""How the commands end after an error."""

from __future__ import annotations

import os
import sys
import traceback


def report_failure(error: Exception) -> int:
    """Print what is wrong, after a traceback if nobody foresaw it. Returns the exit code: 2 if the user can correct it.

    A rank of several exits here and now: the others' next collective fails, and they end too.
    """
    # torch is imported here, not by --help.
    from checkpoint_convert.errors import ConversionError
    from megatron_vlm.config import ConfigError
    from megatron_vlm.data.errors import DataError
    from megatron_vlm.inference.ranks import is_lost_rank
    from megatron_vlm.inference.request import EngineError
    from megatron_vlm.runtime.out_of_memory import describe_out_of_memory, is_out_of_memory
    from megatron_vlm.training.checkpoint import CheckpointError

    code, message = 1, str(error)
    if isinstance(error, CheckpointError | ConfigError | ConversionError | DataError):
        code = 2
    elif is_out_of_memory(error):
        message = describe_out_of_memory(error)
    elif isinstance(error, EngineError):
        if error.__cause__ is not None and not is_lost_rank(error.__cause__):
            traceback.print_exception(error.__cause__)
    else:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {error}"
    rank = os.environ.get("RANK")
    print(message if rank is None else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    return code
