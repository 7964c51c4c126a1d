"""Logging: every rank logs to stderr, each line with its rank; rank 0 alone prints the run's progress to stdout.

Modules log through `logging.getLogger(__name__)` what concerns one rank, such as a failed read or a damaged file. What
concerns the whole run, such as loss, checkpoints and data, goes through `log_rank0`.
"""

from __future__ import annotations

import logging
import sys

import torch.distributed as dist

logger = logging.getLogger("megatron_vlm")


def configure_logging(name: str = "") -> None:
    """Log to stderr at level INFO, each line with the global rank and `name`, such as the parallel ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    prefix = f"rank {rank}" + (f" {name}" if name else "")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [{prefix}] %(levelname)s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log_rank0(message: str) -> None:
    """Print a line to stdout on global rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(message, flush=True)
