"""Importing megatron_patches hides megatron-core's known noise, and nothing else."""

from __future__ import annotations

import subprocess
import sys


def test_known_noise_is_hidden_and_useful_warnings_are_shown() -> None:
    script = (
        "import megatron_vlm.runtime.megatron_patches\n"
        "from megatron.core.transformer.transformer_config import TransformerConfig\n"
        "TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, recompute_granularity='selective')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=True)
    shown = [line for line in done.stderr.splitlines() if "Warning: " in line]
    assert len(shown) == 1 and "core_attn recompute is really needed" in shown[0], done.stderr


def test_torchs_compiler_is_not_loaded_on_a_cpu() -> None:
    """It takes as long as everything else of a rank's start."""
    script = (
        "import sys, torch\n"
        "import megatron_vlm.training.trainer\n"
        "loaded = [name for name in ('torch._dynamo', 'torch._inductor.compile_fx') if name in sys.modules]\n"
        "assert torch.compile.__module__ == 'torch'\n"
        "assert torch.cuda.is_available() or not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], timeout=240, check=True)
