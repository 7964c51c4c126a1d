"""The one error of checkpoints."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint that is absent, incomplete, unsafe or of another model; the message says which and what to do."""
