"""LoRA adapters leave a checkpoint merged into the weights, or as files that peft loads; both have equal logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlavaNextForConditionalGeneration

from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.mapping.lora import MergedTensors
from checkpoint_convert.mapping.param_map import param_map
from checkpoint_convert.megatron.files import checkpoint_recipe, stored_tensors, tensors_of, write_checkpoint
from megatron_vlm.config import Recipe
from megatron_vlm.config.training import LORA_MODULES
from megatron_vlm.model.build import build_model
from megatron_vlm.model.layers.lora import is_adapter
from megatron_vlm.runtime.launch import distributed
from megatron_vlm.training.checkpoint import load_checkpoint, require_checkpoint
from tests.checkpoint_convert.whole_model import SINGLE, WIDE, our_logits, prompt
from tests.support.random_models import GROUPED_QUERY_SIZES, write_llava_next

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["all", "q and down"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A folder with a checkpoint, in `lora`, that has adapters with random numbers; and its recipe."""
    folder = tmp_path_factory.mktemp("lora")
    write_llava_next(folder / "source", language=GROUPED_QUERY_SIZES)
    base, lora = folder / "base", folder / "lora"
    assert hf_to_megatron.main(["--model", str(folder / "source"), "--save", str(base)]) == 0
    recipe = checkpoint_recipe(base)
    training = recipe.training
    training.trainable, training.lora_r, training.lora_alpha = ["projector", "language_lora"], 4, 6.0
    training.lora_target_modules = list(LORA_MODULES) if request.param == "all" else ["q_proj", "down_proj"]
    tensors: dict[str, torch.Tensor] = dict(stored_tensors(base).items())
    with distributed(recipe.parallel):
        (model,) = build_model(recipe, torch.device("meta"))
        shapes = {name: tensor.shape for name, tensor in tensors_of(model).items() if is_adapter(name)}
    generator = torch.Generator().manual_seed(5)
    tensors |= {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    assert len(shapes) == 2 * 3 * len(training.lora_target_modules)
    assert write_checkpoint(lora, recipe, tensors, "") == []
    shutil.copytree(base / "tokenizer", lora / "tokenizer")
    return folder, recipe


@pytest.fixture(scope="module")
def expected(trained: tuple[Path, Recipe]) -> torch.Tensor:
    """Logits of our model with its adapters apart."""
    folder, recipe = trained
    with distributed(recipe.parallel):
        chunks = build_model(recipe)
        load_checkpoint(require_checkpoint(folder / "lora"), chunks, recipe)
        return our_logits(chunks[0].eval(), prompt(recipe.model, [SINGLE, WIDE])[0])


def _export(folder: Path, name: str, *flags: str) -> Path:
    assert megatron_to_hf.main(["--load", str(folder / "lora"), "--save", str(folder / name), *flags]) == 0
    return folder / name


@torch.no_grad()
def _logits(model: torch.nn.Module, recipe: Recipe) -> torch.Tensor:
    logits: torch.Tensor = model(**prompt(recipe.model, [SINGLE, WIDE])[1]).logits[0]
    return logits


def _compare(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert (ours - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))


def test_merged_export_has_the_logits_of_the_model_with_adapters(
    trained: tuple[Path, Recipe], expected: torch.Tensor
) -> None:
    folder, recipe = trained
    merged = LlavaNextForConditionalGeneration.from_pretrained(_export(folder, "merged", "--format", "llava_next"))
    _compare(_logits(merged.eval(), recipe), expected)


def test_peft_loads_the_adapter_onto_the_export_without_it(
    trained: tuple[Path, Recipe], expected: torch.Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    import peft

    folder, recipe = trained
    base = LlavaNextForConditionalGeneration.from_pretrained(
        _export(folder, "without", "--format", "llava_next", "--no-merge-lora")
    ).eval()
    assert (_logits(base, recipe) - expected).abs().max() > 0.1, "the adapter changes something"
    adapter = _export(folder, "adapter", "--format", "peft")
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    assert not [str(warning.message) for warning in recwarn if "missing" in str(warning.message)]
    of_adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(of_adapters) == 2 * 3 * len(recipe.training.lora_target_modules)
    assert all(".language_model." in name for name in of_adapters)
    _compare(_logits(model, recipe), expected)
    _compare(_logits(model.merge_and_unload(), recipe), expected)


def test_merged_weights_are_peft_s(trained: tuple[Path, Recipe]) -> None:
    """Name by name: W + alpha / r B A, and what has no adapter bit for bit."""
    folder, recipe = trained
    stored = stored_tensors(folder / "lora")
    merged = MergedTensors(param_map(recipe.model), stored, 1.5)
    assert not [name for name in merged if is_adapter(name)]
    down = "language_model.decoder.layers.1.mlp.linear_fc2"
    change = stored[f"{down}.lora.down_proj.B"] @ stored[f"{down}.lora.down_proj.A"]
    torch.testing.assert_close(merged[f"{down}.weight"], stored[f"{down}.weight"] + 1.5 * change)
    norm = "vision_model.pre_norm.weight"
    assert torch.equal(merged[norm], stored[norm])


def test_a_model_without_adapter_has_none_to_export(
    trained: tuple[Path, Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    of_base = {"no-adapter": ["--format", "peft"], "no-base": ["--format", "llava_next", "--no-merge-lora"]}
    for name, flags in of_base.items():
        save = folder / name
        assert megatron_to_hf.main(["--load", str(folder / "base"), "--save", str(save), *flags]) == 1
        assert "has no LoRA adapter" in capsys.readouterr().err
        assert not save.exists()


def test_the_adapter_s_config_is_what_peft_reads(trained: tuple[Path, Recipe]) -> None:
    folder, recipe = trained
    adapter = folder / "adapter"
    if not adapter.exists():
        _export(folder, "adapter", "--format", "peft")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.0)
    modules = config["target_modules"].rpartition("(")[2].rstrip(")").split("|")
    assert modules == recipe.training.lora_target_modules
