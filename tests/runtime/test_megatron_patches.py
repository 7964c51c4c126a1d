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
