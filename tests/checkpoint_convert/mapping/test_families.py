"""Every family, converted there and back through several parallel layouts, also with fewer key/value heads than ranks.

The reference logits are computed once per family; the ranks that load the checkpoints are started once.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert import hf_to_megatron, megatron_to_hf, verify
from checkpoint_convert.huggingface.safetensors import FolderTensors
from tests.checkpoint_convert.mapping import run_families
from tests.checkpoint_convert.mapping.run_families import name_of
from tests.checkpoint_convert.whole_model import TALL, WIDE, model_config, prompt
from tests.support.forked_ranks import launch_forked
from tests.support.random_models import FAMILIES, QWEN2_SIZES, SIGLIP_SIZES, randomize, write_llava_next

TOLERANCE = 1e-4
TP2 = {"tensor_model_parallel_size": 2}
CP4 = {"context_parallel_size": 4}
TP2_CP2 = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
SPLIT_TOWER = {"tensor_model_parallel_size": 2, "vision_parallel": "tensor"}
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "clip, llama": [TP2],
    "siglip, qwen2": [SPLIT_TOWER, TP2_CP2],  # one key/value head
    "siglip without head, mistral": [CP4, TP2_CP2],  # two
}
TEXT_SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
"""Of SigLIP's text tower, which is not converted."""
CASES = [pytest.param(family, name_of(layout)) for family, layouts in LAYOUTS.items() for layout in layouts]


def _write_reference(reference: Any, file: Path) -> None:
    """Write a row with two images, of a length that four ranks divide, and transformers' logits of it."""
    batch, inputs = prompt(model_config(reference), [WIDE, TALL])
    more = -len(batch.tokens) % 4
    tokens = torch.cat([batch.tokens, torch.arange(5, 5 + more)])
    batch = replace(
        batch,
        tokens=tokens,
        labels=torch.full_like(tokens, -100),
        positions=torch.arange(len(tokens)),
        cu_seqlens=[0, len(tokens)],
        num_tokens=len(tokens),
    )
    with torch.no_grad():
        logits = reference(**(inputs | {"input_ids": tokens[None]})).logits[0]
    torch.save({"batch": vars(batch), "logits": logits}, file)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, float]]]:
    """The folder of all families, and the largest difference of logits by family and layout."""
    root = tmp_path_factory.mktemp("families")
    for family, settings in FAMILIES.items():
        folder = root / family
        reference = write_llava_next(folder / "source", **settings)
        assert hf_to_megatron.main(["--model", str(folder / "source"), "--save", str(folder / "megatron")]) == 0
        _write_reference(reference, folder / "reference.pt")
    (root / "cases.json").write_text(json.dumps(LAYOUTS))
    launch_forked(Path(run_families.__file__), root, ranks=4, timeout=240)
    return root, json.loads((root / "found.json").read_text())


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_logits_are_those_of_transformers(
    found: tuple[Path, dict[str, dict[str, float]]], family: str, layout: str
) -> None:
    assert 0 < found[1][family][layout] < TOLERANCE


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_weights_saved_in_a_layout_are_those_of_the_source(
    found: tuple[Path, dict[str, dict[str, float]]], family: str, layout: str
) -> None:
    folder = found[0] / family
    assert verify.main([str(folder / "source"), str(folder / "saved" / layout), "--weights-only"]) == 0


@pytest.mark.parametrize("family", LAYOUTS)
def test_there_and_back_through_ranks_is_bit_for_bit(
    found: tuple[Path, dict[str, dict[str, float]]], family: str, tmp_path: Path
) -> None:
    folder, layout = found[0] / family, name_of(LAYOUTS[family][-1])
    export = ["--load", str(folder / "saved" / layout), "--save", str(tmp_path / "exported"), "--format", "llava_next"]
    assert megatron_to_hf.main(export) == 0
    before, after = FolderTensors(folder / "source", "llava"), load_file(tmp_path / "exported" / "model.safetensors")
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_outputs_of_a_checkpoint_saved_by_ranks(
    found: tuple[Path, dict[str, dict[str, float]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """All of verify: the source in transformers, what TP 2 x CP 2 ranks saved in the engine."""
    folder = found[0] / "siglip, qwen2"
    assert verify.main([str(folder / "source"), str(folder / "saved" / name_of(TP2_CP2))]) == 0
    assert capsys.readouterr().out.count(", the same\n") == 4


def test_parts_of_other_families(tmp_path: Path) -> None:
    """SigLIP as it is published, with its text tower in the same file, and Qwen2."""
    from transformers import CONFIG_MAPPING, Qwen2ForCausalLM, SiglipModel

    sizes = QWEN2_SIZES | {"rope_parameters": {"rope_theta": QWEN2_SIZES["rope_theta"], "rope_type": "default"}}
    decoder = Qwen2ForCausalLM(CONFIG_MAPPING["qwen2"](**{k: v for k, v in sizes.items() if k != "rope_theta"}))
    towers = SiglipModel(CONFIG_MAPPING["siglip"](vision_config=SIGLIP_SIZES, text_config=TEXT_SIZES))
    for model, folder in ((decoder, tmp_path / "qwen2"), (towers, tmp_path / "siglip")):
        randomize(model)
        model.save_pretrained(folder)
    write_tokenizer(tmp_path / "qwen2")
    arguments = ["--vision-model", str(tmp_path / "siglip"), "--language-model", str(tmp_path / "qwen2")]
    assert hf_to_megatron.main([*arguments, "--save", str(tmp_path / "megatron")]) == 0
    for part in ("siglip", "qwen2"):
        assert verify.main([str(tmp_path / part), str(tmp_path / "megatron")]) == 0
