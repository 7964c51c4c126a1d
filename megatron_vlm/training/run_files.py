"""The files that a run writes beside its checkpoints: metrics, TensorBoard, lists of samples, traces.

They grow line by line, which objects in a store cannot. Where `training.save` is an s3:// prefix, they grow in a local
folder of each node, and every checkpoint sends them along: a run that resumes on other nodes finds them there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch.distributed as dist

from megatron_vlm.config import Recipe
from megatron_vlm.data.sample_log import SAMPLES_PATTERN, truncate_logs
from megatron_vlm.runtime.launch import local_rank
from megatron_vlm.runtime.logging import log_rank0
from megatron_vlm.runtime.s3 import join, objects
from megatron_vlm.runtime.s3.multipart import upload_file
from megatron_vlm.runtime.s3.path import S3Path, storage_path

_CONTINUED = re.compile(r".+\.jsonl|.+_run_id\.txt")
"""Names of files that a run that is started again continues: one line after the other, or ids of its records."""
_SAMPLES = re.compile(SAMPLES_PATTERN.replace("*", r"(\d+)"))
_FOLDERS = ("tensorboard", "profile")
"""Folders whose files are sent, too. Each start writes files of its own there."""


def run_folder(recipe: Recipe) -> Path | None:
    """Where this process writes them: training.save, or its local folder on this node; None without a training.save."""
    if recipe.training.save is None:
        return None
    save = storage_path(recipe.training.save)
    if isinstance(save, Path):
        return save
    name = re.sub(r"[^\w.-]+", "_", save.url.removeprefix("s3://"))[:80]
    digest = hashlib.sha256(save.url.encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir(), f"megatron-vlm-{os.getuid()}", f"{name}-{digest}")


class RunFiles:
    """Brings these files from the store at the start and sends them with each checkpoint; does nothing on a disk."""

    def __init__(self, recipe: Recipe, consumed_rows: int) -> None:
        """A collective call.

        Args:
            recipe: of the run.
            consumed_rows: up to its checkpoint; later rows are removed from the sample lists.

        Raises:
            S3Error: the store cannot be read.
        """
        self._sent: dict[Path, int] = {}
        save = storage_path(recipe.training.save or "")
        self._remote = save if isinstance(save, S3Path) else None
        if self._remote is None:
            return
        folder = run_folder(recipe)
        assert folder is not None
        self.folder = folder
        if local_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of an older start on this node; the store has what counts
            folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        for name in filter(_CONTINUED.fullmatch, objects.list_folder(str(self._remote))):
            if self._is_ours(name):
                (folder / name).write_bytes((self._remote / name).read_bytes())
                if _SAMPLES.fullmatch(name):
                    truncate_logs(folder, consumed_rows, name)
        dist.barrier()
        log_rank0(f"metrics and other logs are written to {folder}, and sent to {self._remote} with each checkpoint")

    def _is_ours(self, name: str) -> bool:
        """Each rank has its own list of samples. Rank 0 has those of ranks of an earlier start and all else."""
        samples = _SAMPLES.fullmatch(name)
        owner = int(samples[1]) if samples else 0
        return dist.get_rank() == (owner if owner < dist.get_world_size() else 0)

    def send(self) -> None:
        """Send the files of this rank that have changed; every rank calls this.

        Raises:
            S3Error: one could not be written.
        """
        if self._remote is None:
            return
        files = [path for path in self.folder.iterdir() if self._is_ours(path.name)]
        if dist.get_rank() == 0:
            files += [path for name in _FOLDERS for path in (self.folder / name).rglob("*")]
        for path in sorted(files):
            if not path.is_file() or path.name.startswith("."):  # a folder, or a file that is about to be renamed
                continue
            size = path.stat().st_size
            if self._sent.get(path) != size:
                upload_file(path, join(str(self._remote), str(path.relative_to(self.folder))))
                self._sent[path] = size

    def send_last(self) -> None:
        """At the end of a run, when all of its checkpoints are stored: a failure is a warning."""
        try:
            self.send()
        except OSError as error:
            log_rank0(f"WARNING: the last lines of the logs stay in {self.folder}: {error}")
