"""Logs: every rank says who it is; one rank speaks for the run."""

from __future__ import annotations

import logging
import sys

import torch.distributed as dist

logger = logging.getLogger("megatron_vlm")


def configure_logging(name: str = "") -> None:
    """Send this process's log to stderr, each line with its rank and, once known, its place in the layout."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    who = f"rank {rank}" + (f" {name}" if name else "")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [{who}] %(levelname)s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log_rank0(message: str) -> None:
    """One line for the person watching, printed by rank 0 alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(message, flush=True)
