"""What `pip install '.[inference]'` brings, and what it leaves out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.environments import Environment
from tests.support.launch import ROOT

TRAINERS = ("megatron", "streaming", "boto3", "botocore", "tensorboard", "sentencepiece")


@pytest.mark.full
def test_trainer_is_left_out(inference: Environment) -> None:
    code = f"from importlib.util import find_spec; print([name for name in {TRAINERS} if find_spec(name)])"
    assert inference.run("-c", code).stdout.strip() == "[]"
    imported = inference.run("-c", "import instellavl.model.builder, requests; print(instellavl.__file__)")
    assert imported.stdout.startswith(str(inference.packages)), imported.stderr


@pytest.mark.full
def test_trainer_says_how_to_install_it(inference: Environment) -> None:
    for module in ("megatron_vlm.train", "checkpoint_convert.megatron_to_hf"):
        done = inference.run("-m", module, "--help")
        assert done.returncode != 0
        assert "megatron-core, psutil, not installed here" in done.stderr
        assert "pip install '.[train]'" in done.stderr


def test_what_is_missing_is_named() -> None:
    code = "import sys; sys.modules['megatron'] = None; import megatron_vlm"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert "trains and converts with megatron-core, not installed here" in done.stderr.splitlines()[-1]
