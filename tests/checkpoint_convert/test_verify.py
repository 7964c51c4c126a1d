"""The command verify: equal models in several formats, and every kind of difference is reported."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert import hf_to_megatron, megatron_to_hf, verify
from tests.support.random_models import GROUPED_QUERY_SIZES, clip_vision_model, write_llava_next

SIZES = GROUPED_QUERY_SIZES | {"num_attention_heads": 6, "num_key_value_heads": 6}  # q and k have one shape


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as transformers wrote it (source), as a Megatron checkpoint, as `instellavl`, and its projector."""
    root = tmp_path_factory.mktemp("verify")
    write_llava_next(root / "source", language=SIZES)
    assert hf_to_megatron.main(["--model", str(root / "source"), "--save", str(root / "megatron")]) == 0
    for name in ("instellavl", "projector"):
        export = ["--load", str(root / "megatron"), "--save", str(root / name), "--format", name]
        assert megatron_to_hf.main(export) == 0
    return root


def _verify(*arguments: str | Path) -> int:
    return verify.main([str(argument) for argument in arguments])


def test_one_model_in_three_formats(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Logits of transformers' LlavaNext, of megatron_vlm's engine and of the remote-code class."""
    for other in ("megatron", "instellavl"):
        assert _verify(models / "source", models / other) == 0
        output = capsys.readouterr().out
        assert re.search(r"vision +87 +87 +0 +0  0", output), output
        assert re.search(r"projector +5 +5 +0 +0  0", output)
        assert re.search(r"language +23 +23 +0 +0  0", output)
        assert "settings   the same" in output
        assert "tokenizer  the same ids" in output
        rows = re.findall(r"^(text|square|tall|wide) +(\d+) +(\S+) +(\d+), the same$", output, re.MULTILINE)
        assert [row[0] for row in rows] == ["text", "square", "tall", "wide"]
        assert all(float(apart) <= 1e-4 for _, _, apart, _ in rows)
        if other == "megatron":
            assert any(float(apart) > 0 for _, _, apart, _ in rows), "two implementations differ by rounding"
        assert all(int(positions) > 30 for _, positions, _, _ in rows)
        assert output.endswith("\nthe same\n")


def _weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _setting(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            (config[section] if section else config)[name] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


ATTENTION = "language_model.model.layers.1.self_attn."


def _one_ulp(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors[ATTENTION + "v_proj.weight"]
    weight[4, 7] = torch.nextafter(weight[4, 7], torch.tensor(9.0))


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    q, k = ATTENTION + "q_proj.weight", ATTENTION + "k_proj.weight"
    tensors[q], tensors[k] = tensors[k].clone(), tensors[q].clone()


def _other_tokenizer(folder: Path) -> None:
    definition = json.loads((folder / "tokenizer.json").read_text())
    vocab = definition["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(definition))


CHANGES = {
    "one ulp": (_weights(_one_ulp), [f"values differ (1):\n  {ATTENTION}v_proj.weight: "]),
    "q and k swapped": (_weights(_swap), ["values differ (2)", f"  {ATTENTION}q_proj.weight", f"  {ATTENTION}k_proj"]),
    "missing tensor": (_weights(lambda t: t.pop("image_newline")), ["only in A, or in neither (1):\n  image_newline"]),
    "additional tensor": (_weights(lambda t: t.update(more=torch.ones(2))), ["only in B (1):\n  more"]),
    "another shape": (
        _weights(lambda t: t.update(image_newline=torch.ones(5))),
        ["image_newline: (48,) and (5,)", "outputs    not compared"],
    ),
    "another setting": (
        _setting(text_config__rms_norm_eps=1e-3, vision_config__layer_norm_eps=1e-3),
        ["settings   differ", "vision.layer_norm_eps is 1e-05 in A and 0.001 in B"],
    ),
    "other resolutions": (
        _setting(image_grid_pinpoints=[[28, 28]]),
        ["image_grid_pinpoints is [[28, 28], [28, 56]"],
    ),
    "another tokenizer": (_other_tokenizer, ["tokenizer  differs: id ", "outputs    not compared"]),
    "a longer tokenizer": (
        lambda folder: write_tokenizer(folder, 272) and None,
        ["tokenizer  differs: length is 270 in A and 272 in B"],
    ),
}


@pytest.mark.parametrize(("change", "messages"), CHANGES.values(), ids=CHANGES.keys())
def test_what_differs_is_named(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    messages: list[str],
) -> None:
    shutil.copytree(models / "source", tmp_path / "changed")
    change(tmp_path / "changed")
    assert _verify(models / "megatron", tmp_path / "changed", "--weights-only") == (
        0 if "tokenizer" in messages[0] else 1
    )
    output = capsys.readouterr().out
    if "outputs    not compared" in messages or "tokenizer" in messages[0]:
        assert _verify(models / "megatron", tmp_path / "changed") == 1
        output = capsys.readouterr().out
    assert "DIFFERENT" in output
    for message in messages:
        assert message in output


def test_outputs_are_compared(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights within a wide tolerance may still give other outputs; the first differing tokens are reported."""
    shutil.copytree(models / "source", tmp_path / "changed")
    _weights(lambda t: t["language_model.lm_head.weight"].mul_(-0.1))(tmp_path / "changed")
    assert _verify(models / "source", tmp_path / "changed", "--tolerance", "9") == 1
    output = capsys.readouterr().out
    assert re.search(r"language +23 +22 +1 +0", output)
    assert re.search(r"text +\d+ +\d\.\d+ +differ after 0: \[\d+, \d+, \d+\] in A", output), output


def test_rounding_is_reported(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--load", str(models / "megatron"), "--save", str(tmp_path / "half")]
    assert megatron_to_hf.main([*folders, "--format", "llava_next", "--dtype", "bfloat16"]) == 0
    assert _verify(models / "source", tmp_path / "half", "--weights-only") == 1
    output = capsys.readouterr().out
    assert "115 tensors are float32 in A and bfloat16 in B" in output
    assert "all differences are roundings to the narrower dtype" in output
    assert _verify(models / "source", tmp_path / "half", "--weights-only", "--tolerance", "0.01") == 0
    capsys.readouterr()
    wide = load_file(tmp_path / "half" / "model.safetensors")
    shutil.copytree(tmp_path / "half", tmp_path / "wide")
    save_file({k: v.float() for k, v in wide.items()}, tmp_path / "wide/model.safetensors", metadata={"format": "pt"})
    assert _verify(tmp_path / "half", tmp_path / "wide") == 0, "the same values in a wider dtype"
    assert "115 tensors are bfloat16 in A and float32 in B; values were compared" in capsys.readouterr().out


def test_a_part_is_compared_with_a_whole_model(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(models / "projector", models / "source") == 0
    output = capsys.readouterr().out
    assert "compared: projector" in output
    assert re.search(r"projector +5 +5 +0 +0", output)
    clip_vision_model(seed=5).save_pretrained(tmp_path / "clip")
    assert _verify(models / "megatron", tmp_path / "clip") == 1
    assert re.search(r"vision +87 +0 +0 +87", capsys.readouterr().out)


def test_models_that_cannot_be_compared(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip_vision_model().save_pretrained(tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    shutil.copytree(models / "source", tmp_path / "speechless")
    (tmp_path / "speechless" / "tokenizer.json").unlink()
    for first, second, message in (
        (models / "source", tmp_path / "empty", f"{tmp_path / 'empty'} is not a model: it has neither config.json"),
        (models / "source", tmp_path / "speechless", "speechless has no tokenizer that can be read"),
        (tmp_path / "nowhere", models / "source", "nowhere is not a model"),
        (
            tmp_path / "clip",
            models / "projector",
            f"clip (clip_vision_model) has vision, {models / 'projector'} (projector) projector",
        ),
    ):
        assert _verify(first, second) == 2
        reported = capsys.readouterr().err
        assert message in reported
        assert reported.count("error: ") == 1
