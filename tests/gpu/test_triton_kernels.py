"""The Triton kernels equal the plain formulas: in Triton's interpreter where it is installed, and on a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.launch import launch

SCRIPT = Path(__file__).with_name("run_triton_kernels.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="torch's CPU builds come without Triton")
def test_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch(SCRIPT, "cpu", ranks=1, timeout=120)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    launch(SCRIPT, "cuda", ranks=1, timeout=120)
