"""Run where bitsandbytes is installed: an export quantized in 8 and 4 bits.

python tests/instellavl/quantized.py FOLDER with FOLDER/instellavl and FOLDER/image.png; writes FOLDER/quantized.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from answer import local_checkpoint
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from PIL import Image

from instellavl.model.builder import load_pretrained_model
from instellavl.processing_instellavl import InstellaVLProcessor

NEW_IDS = 16
ASKED = "model_name, False, False"
QUANTIZED = {"load_8bit": "model_name, True, False", "load_4bit": "model_name, False, True"}


def dequantized(layer: torch.nn.Module) -> torch.Tensor | None:
    """The dequantized weight of a layer; None if the layer is not quantized."""
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if isinstance(layer, Linear8bitLt):
        return layer.weight.data.float() * layer.weight.SCB[:, None] / 127  # a row's largest value is 127
    return None


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def new_ids(model: Any, inputs: tuple[Any, ...]) -> list[int]:
    ids = model.generate(*inputs, do_sample=False, min_new_tokens=NEW_IDS, max_new_tokens=NEW_IDS)
    return ids[0, -NEW_IDS:].tolist()


def report(folder: Path, how: str, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Which layers are quantized, which others changed, and the distance of the logits from two references."""
    full = load_pretrained_model(str(folder / "instellavl"))[1]
    model = load_pretrained_model(str(folder / "instellavl"), **{how: True})[1]
    reference, before = full(*inputs).logits, dict(full.named_parameters())
    weights = {name: weight for name, layer in model.named_modules() if (weight := dequantized(layer)) is not None}
    changed = [
        name
        for name, parameter in model.named_parameters()
        if name.removesuffix(".weight") not in weights and not torch.equal(parameter, before[name])
    ]
    # On a processor with AVX512-BF16, bitsandbytes rounds what 4-bit layers read to bf16, unless it is kept from it.
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    logits, answer = model(*inputs).logits, new_ids(model, inputs)
    as_it_runs = load_pretrained_model(str(folder / "instellavl"), **{how: True})[1](*inputs).logits
    for name, weight in weights.items():
        before[f"{name}.weight"].copy_(weight.reshape(before[f"{name}.weight"].shape))
    return {
        "quantized": sorted(weights),
        "others changed": changed,
        "from the model": distance(logits, reference),
        "from its own weights": distance(logits, full(*inputs).logits),
        "as it runs": distance(as_it_runs, full(*inputs).logits),
        "ids": answer,
        "ids of its own weights": new_ids(full, inputs),
        "snippet": local_checkpoint(folder, folder / "image.png", (ASKED, QUANTIZED[how])),
    }


@torch.no_grad()
def main(folder: Path) -> None:
    tokenizer, _, image_processor, _ = load_pretrained_model(str(folder / "instellavl"))
    encoded = InstellaVLProcessor(image_processor, tokenizer).encode("A dog?", Image.open(folder / "image.png"))
    inputs = tuple(encoded[name] for name in ("input_ids", "image_tensor", "image_sizes"))
    (folder / "quantized.json").write_text(json.dumps({how: report(folder, how, inputs) for how in QUANTIZED}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
