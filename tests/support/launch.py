"""Start the ranks of a test with a timeout; show their output if they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(*command: str | Path, ranks: int, timeout: float, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script (or `-m`, module) on `ranks` processes of this machine; torchrun starts them if ranks > 1."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    arguments = [sys.executable, *torchrun, *map(str, command)]
    result = subprocess.run(
        arguments,
        cwd=ROOT,
        env=environment,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if check and result.returncode:
        raise AssertionError(f"{' '.join(map(str, command))} on {ranks} ranks failed:\n{result.stdout[-6000:]}")
    return result
