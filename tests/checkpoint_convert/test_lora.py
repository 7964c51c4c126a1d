"""LoRA adapters leave a checkpoint merged into the weights, or as files that peft loads; both have equal logits.

The other way round, an adapter that peft saved becomes one of a checkpoint, beside the weights of its base model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaNextForConditionalGeneration

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.mapping.lora import MergedTensors
from checkpoint_convert.mapping.param_map import param_map
from checkpoint_convert.megatron.files import (
    checkpoint_recipe,
    stored_tensors,
    tensors_of,
    trained_recipe,
    write_checkpoint,
)
from checkpoint_convert.model_config import complete_recipe
from megatron_vlm.config import Recipe
from megatron_vlm.config.lora import lora_settings
from megatron_vlm.config.training import LORA_MODULES
from megatron_vlm.model.build import build_model
from megatron_vlm.model.layers.lora import is_adapter
from megatron_vlm.runtime.launch import distributed
from megatron_vlm.training.checkpoint import load_checkpoint, require_checkpoint
from tests.checkpoint_convert.whole_model import SINGLE, WIDE, our_logits, prompt
from tests.support.random_models import GROUPED_QUERY_SIZES, randomize, write_llava_next

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
    return _our_logits(folder / "lora", recipe)


def _our_logits(checkpoint: Path, recipe: Recipe) -> torch.Tensor:
    with distributed(recipe.parallel):
        chunks = build_model(recipe)
        load_checkpoint(require_checkpoint(checkpoint), chunks, recipe)
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


def _import(base: Path, adapter: Path, save: Path) -> int:
    return hf_to_megatron.main(["--model", str(base), "--adapter", str(adapter), "--save", str(save)])


def test_an_exported_adapter_comes_back_tensor_for_tensor(trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    folder, recipe = trained
    for name, flags in {"base": ("llava_next", "--no-merge-lora"), "adapter": ("peft",)}.items():
        arguments = ["--load", str(folder / "lora"), "--save", str(tmp_path / name), "--format", *flags]
        assert megatron_to_hf.main(arguments) == 0
    assert _import(tmp_path / "base", tmp_path / "adapter", tmp_path / "back") == 0
    before, after = stored_tensors(folder / "lora"), stored_tensors(tmp_path / "back")
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert lora_settings(trained_recipe(tmp_path / "back").training) == lora_settings(recipe.training)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    write_llava_next(folder, language=GROUPED_QUERY_SIZES)
    return folder


def _save_adapter(model: Any, folder: Path, **settings: Any) -> Any:
    """Put a LoRA adapter with random numbers on `model`, and save it as peft does. Returns the model with it."""
    import peft

    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for seed, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_" in name:
            generator = torch.Generator().manual_seed(seed)
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return adapted.eval()


PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "all": {"r": 5, "lora_alpha": 7, "target_modules": r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": r".*language_model.*\.(v|up)_proj"},
    "dropout": {"r": 2, "lora_alpha": 2, "lora_dropout": 0.5, "target_modules": r".*language_model.*\.o_proj"},
}


@pytest.mark.parametrize("settings", PEFT_SETTINGS.values(), ids=PEFT_SETTINGS.keys())
def test_an_imported_adapter_has_the_logits_that_peft_computes(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    reference = LlavaNextForConditionalGeneration.from_pretrained(base).eval()
    adapted = _save_adapter(reference, tmp_path / "adapter", **settings)
    assert _import(base, tmp_path / "adapter", tmp_path / "imported") == 0
    recipe = trained_recipe(tmp_path / "imported")
    assert recipe.training.trainable == ["projector", "language_lora"]
    expected = _logits(adapted, recipe)
    _compare(_our_logits(tmp_path / "imported", recipe), expected)
    with adapted.disable_adapter():
        assert (_logits(adapted, recipe) - expected).abs().max() > 0.1, "the adapter changes something"


def test_an_adapter_of_a_language_model_alone(base: Path, tmp_path: Path) -> None:
    """On its own model, which a tower and a projector join, it is the adapter that it is on the whole one."""
    whole = LlavaNextForConditionalGeneration.from_pretrained(base)
    language = _language_alone(whole, tmp_path / "language")
    _save_adapter(language, tmp_path / "adapter", r=3, lora_alpha=4, target_modules=["q_proj", "up_proj"])
    arguments = ["--vision-model", str(base), "--language-model", str(tmp_path / "language")]
    arguments += ["--adapter", str(tmp_path / "adapter"), "--save", str(tmp_path / "joined")]
    assert hf_to_megatron.main(arguments) == 0
    assert _import(base, tmp_path / "adapter", tmp_path / "imported") == 0
    joined, imported = stored_tensors(tmp_path / "joined"), stored_tensors(tmp_path / "imported")
    adapters = [name for name in joined if is_adapter(name)]
    assert len(adapters) == 2 * 3 * 2
    assert all(torch.equal(joined[name], imported[name]) for name in adapters)


def _language_alone(whole: Any, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    language = AutoModelForCausalLM.from_config(whole.config.text_config)
    randomize(language)
    language.save_pretrained(folder)
    write_tokenizer(folder)
    return language


def test_training_continues_with_the_adapter_s_settings(base: Path, tmp_path: Path) -> None:
    """Rank, alpha and modules need not be repeated; those that are given are kept, and checked at the start."""
    model = LlavaNextForConditionalGeneration.from_pretrained(base)
    _save_adapter(model, tmp_path / "adapter", **PEFT_SETTINGS["all"])
    assert _import(base, tmp_path / "adapter", tmp_path / "imported") == 0
    recipe = Recipe()
    recipe.training.pretrained_checkpoint = str(tmp_path / "imported")
    complete_recipe(recipe, set())
    assert recipe.training.lora_r == 128, "the run has no adapters"
    recipe.training.trainable = ["language_lora"]
    complete_recipe(recipe, {"training.lora_alpha"})
    training = recipe.training
    assert (training.lora_r, training.lora_alpha, training.lora_target_modules) == (5, 256.0, list(LORA_MODULES))


def _config(**settings: Any) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return edit


def _tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        file.unlink()
        save_file(tensors, file)

    return rewrite


def _renamed(before: str, after: str) -> Callable[[Path], None]:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if before in name]:
            tensors[name.replace(before, after)] = tensors.pop(name)

    return _tensors(rename)


def _without(part: str) -> Callable[[Path], None]:
    return _tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name])


WRONG_ADAPTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "is no adapter of peft: it has no adapter_config.json"),
    "no config": (lambda a: (a / "adapter_config.json").unlink(), "it has no adapter_config.json"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "holds no weights"),
    "broken config": (lambda a: (a / "adapter_config.json").write_text("{"), "is not JSON"),
    "a list": (lambda a: (a / "adapter_config.json").write_text("[]"), "holds no settings"),
    "truncated weights": (
        lambda a: (f := a / "adapter_model.safetensors").write_bytes(f.read_bytes()[:900]), "cannot be read"
    ),
    "another method": (_config(peft_type="IA3"), "peft_type is 'IA3'; supported: 'LORA'"),
    "no rank": (_config(r=None), "r is None; expected a whole number above 0"),
    "rank zero": (_config(r=0), "r is 0; expected a whole number above 0"),
    "alpha is text": (_config(lora_alpha="x"), "lora_alpha is 'x'; expected a number above 0"),
    "DoRA": (_config(use_dora=True), "use_dora = True: such adapters cannot be trained here"),
    "ranks per layer": (_config(rank_pattern={"q_proj": 2}), "rank_pattern = {'q_proj': 2}"),
    "trained biases": (_config(bias="lora_only"), "bias = 'lora_only'"),
    "whole modules": (_config(modules_to_save=["lm_head"]), "modules_to_save = ['lm_head']"),
    "a changed base": (_config(init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa_niter_4'"),
    "another rank": (_config(r=8), "layers.0.self_attn.q_proj.lora_A has rank 5, and adapter_config.json says r = 8"),
    "the vision tower": (
        _renamed(".language_model.layers.0.self_attn.q_proj", ".vision_tower.encoder.layers.0.self_attn.q_proj"),
        "has adapters outside the language model's linear layers",
    ),
    "the output layer": (_renamed(".language_model.layers.0.mlp.up_proj", ".lm_head"), "outside the language model"),
    "other target modules": (_config(target_modules=["q_proj", "qkv"]), "lacks the adapters of qkv, which target_mod"),
    "nothing": (_without(""), "holds no tensors"),
    "a missing tensor": (_without("layers.1.mlp.down_proj.lora_B"), "lacks tensors: layers.1.mlp.down_proj.lora_B"),
    "a missing layer": (_without("layers.0."), "lacks tensors: layers.0.self_attn.q_proj.lora_A, layers.0.self_attn"),
    "fewer layers": (_without("layers.2."), "is an adapter of 2 layers, and "),
    "more layers": (_renamed("layers.2.", "layers.9."), "is an adapter of 10 layers, and "),
    "another width": (
        _tensors(lambda t: t.update({name: x[:, :-8].clone() for name, x in t.items() if "q_proj.lora_A" in name})),
        "layers.0.self_attn.q_proj.lora_A is (5, 40), and ",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    _save_adapter(LlavaNextForConditionalGeneration.from_pretrained(base), folder, **PEFT_SETTINGS["all"])
    return folder


@pytest.mark.parametrize(("damage", "message"), WRONG_ADAPTERS.values(), ids=WRONG_ADAPTERS.keys())
def test_wrong_adapter(
    base: Path,
    sound_adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(sound_adapter, adapter)
    damage(adapter)
    capsys.readouterr()
    assert _import(base, adapter, tmp_path / "imported") == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and len(error.splitlines()) == 1, error
    assert message in error and str(adapter) in error, error
    assert not (tmp_path / "imported").exists()
