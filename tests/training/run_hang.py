"""Rank 1 of two hangs in its second step. torchrun --nproc-per-node 2 -m tests.training.run_hang"""

from __future__ import annotations

import signal
import time

import torch
import torch.distributed as dist

from megatron_vlm.runtime.launch import process_group
from megatron_vlm.training.watchdog import Watchdog


def a_disk_that_does_not_answer() -> None:
    time.sleep(600)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # as in training, where it is noted and read after the iteration
    with process_group(timeout_minutes=2):
        watchdog = Watchdog(0.07)
        for step in range(2):
            watchdog.progress()
            if dist.get_rank() == 1 and step == 1:
                a_disk_that_does_not_answer()
            dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    main()
