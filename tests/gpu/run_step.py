"""Train the test model for a few steps in one process on the available device; save the results of each step.

python run_step.py FILE.pt [bf16]
"""

from __future__ import annotations

import sys

import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401
from megatron_vlm.runtime.device import device_kind
from megatron_vlm.runtime.launch import process_group
from tests.parallel.layouts import Layout
from tests.parallel.run_layouts import run


def main(file: str, *options: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with process_group(timeout_minutes=2):
        torch.save({"device": device_kind(), "steps": run(Layout(bf16="bf16" in options))}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
