"""`pip install '.[inference]'` installs what exports need, and not the trainer."""

from __future__ import annotations

import pytest

from tests.support.environments import Environment

TRAINERS = ("megatron", "streaming", "boto3", "botocore", "tensorboard", "sentencepiece")


@pytest.mark.full
def test_trainer_is_not_installed(inference: Environment) -> None:
    code = f"from importlib.util import find_spec; print([name for name in {TRAINERS} if find_spec(name)])"
    assert inference.run("-c", code).stdout.strip() == "[]"
    imported = inference.run("-c", "import instellavl.model.builder, requests; print(instellavl.__file__)")
    assert imported.stdout.startswith(str(inference.packages)), imported.stderr


@pytest.mark.full
def test_trainer_says_how_to_install_it(inference: Environment) -> None:
    for module in ("megatron_vlm.training.trainer", "checkpoint_convert.megatron_to_hf"):
        done = inference.run("-m", module, "--help")
        assert done.returncode != 0
        assert "need megatron-core, psutil, which is not installed" in done.stderr
        assert "pip install 'megatron-vlm[train]'" in done.stderr
