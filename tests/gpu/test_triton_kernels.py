"""The Triton kernels equal the plain formulas: in Triton's interpreter on a CPU, and on a GPU."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.launch import launch

SCRIPT = Path(__file__).with_name("run_triton_kernels.py")


@pytest.mark.full
def test_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's CPU builds come without Triton, which is a gigabyte: then it is installed for this test alone."""
    if find_spec("triton") is None:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), "triton"]
        subprocess.run(install, check=True, timeout=600)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch(SCRIPT, "cpu", ranks=1, timeout=120)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    launch(SCRIPT, "cuda", ranks=1, timeout=120)
