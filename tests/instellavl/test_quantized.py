"""load_8bit and load_4bit with bitsandbytes on a CPU: only the decoder is quantized, and answers stay close."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoint_convert.whole_model import picture
from tests.instellavl.exports import write_exports
from tests.support.environments import Environment
from tests.support.launch import ROOT
from tests.support.random_models import GROUPED_QUERY_SIZES, VISION_SIZES

# bitsandbytes quantizes in blocks of 64
REGULAR_LANGUAGE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 320}
REGULAR_VISION = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}


@pytest.mark.full
@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "own head"])
def test_decoder_is_quantized_and_nothing_else(tmp_path: Path, quantizing: Environment, tied: bool) -> None:
    language = GROUPED_QUERY_SIZES | REGULAR_LANGUAGE | {"tie_word_embeddings": tied}
    model = write_exports(tmp_path, language=language, vision=VISION_SIZES | REGULAR_VISION)
    picture((25, 80)).save(tmp_path / "image.png")
    done = quantizing.run(ROOT / "tests" / "instellavl" / "quantized.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert "will be cast" not in done.stderr, "a warning per layer"
    reports = json.loads((tmp_path / "quantized.json").read_text())
    layers = [f"model.layers.{layer}." for layer in range(model.language.num_hidden_layers)]
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    decoder = [
        layer + name for layer in layers for name in [*attention, *(f"mlp.{m}_proj" for m in ("gate", "up", "down"))]
    ]
    for report in reports.values():
        assert report["quantized"] == sorted(decoder)
        assert report["others changed"] == []
        assert report["snippet"]
    # 4 bits quantize only the weights, 8 bits the activations too.
    assert reports["load_4bit"]["from its own weights"] < 1e-5
    assert reports["load_4bit"]["as it runs"] < 0.02, "bf16 at most"
    assert reports["load_4bit"]["ids"] == reports["load_4bit"]["ids of its own weights"]
    assert reports["load_4bit"]["from the model"] < 0.3
    assert reports["load_8bit"]["from its own weights"] < 0.03
    assert reports["load_8bit"]["from the model"] < 0.04
