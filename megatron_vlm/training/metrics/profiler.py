"""A trace of some iterations, by torch's profiler."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_vlm.config import Recipe
from megatron_vlm.runtime.device import on_gpu
from megatron_vlm.runtime.logging import log_rank0
from megatron_vlm.training.run_files import run_folder

FOLDER = "profile"


class ProfilerWindow:
    """Traces iterations profile_step_start to profile_step_end on rank 0, into SAVE/profile.

    The file is a Chrome trace: open it in https://ui.perfetto.dev.
    """

    def __init__(self, recipe: Recipe) -> None:
        training = recipe.training
        self._first, self._last = training.profile_step_start, training.profile_step_end
        if self._last is None:
            self._last = self._first
        self._folder = (run_folder(recipe) or Path()) / FOLDER
        self._profile: profile | None = None

    def before(self, iteration: int) -> None:
        """Call before the step of `iteration` (from 1)."""
        if iteration == self._first and dist.get_rank() == 0:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu() else [])
            self._profile = profile(activities=activities)
            self._profile.start()

    def after(self, iteration: int) -> None:
        """Call after the step of `iteration`; writes the trace if it is the last one of the window."""
        if self._profile is None or iteration != self._last:
            return
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"iterations-{self._first}-{self._last}.json.gz"
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        log_rank0(f"the trace of iterations {self._first} to {self._last} is in {path}")

    def close(self) -> None:
        """End a window that the run did not reach the end of; nothing is written."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
