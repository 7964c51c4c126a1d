"""Exit codes of `megatron-vlm train`, for whatever starts it again."""

from __future__ import annotations

FINISHED = 0
FAILED = 1
"""An error that may not come again: a lost node, a full disk. Starting again resumes from the newest checkpoint."""
WRONG_SETTINGS = 2
"""Starting again with the same command fails again."""
SAVED = 75
"""Stopped before the last iteration, with a checkpoint of that moment: start again. EX_TEMPFAIL of sysexits.h."""
