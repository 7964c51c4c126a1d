"""Threads that OpenMP started for a Python thread end when it says so, and come back when it computes again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

_SCRIPT = """
import json, os, time
import torch
from megatron_vlm.runtime.openmp import release_threads

def threads():
    return len(os.listdir("/proc/self/task"))

def wait_for(count):
    until = time.monotonic() + 10
    while threads() != count and time.monotonic() < until:
        time.sleep(0.01)
    return threads()

torch.set_num_threads(3)
before = threads()
x = torch.ones(1_000_000)
seen = [threads() - before]
release_threads()
seen.append(wait_for(before) - before)
total = float((x + x).sum())
seen.append(threads() - before)
print(json.dumps([seen, total]))
"""


def test_threads_end_and_come_back() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[2, 0, 2], 2_000_000.0]
