"""Wrong inputs and interrupted conversions give one message that names the key or the file, and leave no folder.

test_conversion.py has wrong weights and configs; here are damaged files and checkpoints, full disks and signals.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event as EventType
from pathlib import Path

import pytest
import torch

from benchmarks.support.random_folder import write_random_folder
from benchmarks.support.random_tokenizer import write_tokenizer
from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.huggingface.safetensors import FolderTensors, TensorSpec, write_weights
from checkpoint_convert.mapping.lazy_tensors import NamedTensors
from checkpoint_convert.mapping.param_map import HuggingFaceTensors, MegatronTensors
from megatron_vlm.config import ModelConfig, recipe_from_dict
from megatron_vlm.training.checkpoint import TRACKER
from tests.training.tiny_run import MODEL


def small_model() -> ModelConfig:
    return recipe_from_dict({"model": MODEL}).model


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, in several files, and `megatron`, the checkpoint of it."""
    folder, model = tmp_path_factory.mktemp("sound"), small_model()
    model.image_token_index = write_tokenizer(folder / "tokenizer")
    write_random_folder(folder / "whole", folder / "tokenizer", model, torch.float32)
    tensors = FolderTensors(folder / "whole", "llava")
    shutil.copytree(folder / "whole", folder / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    plan = [TensorSpec(name, tensors.shape(name), torch.float32) for name in tensors]
    write_weights(tensors.items(), folder / "hf", shard_bytes=200_000, plan=plan)
    assert hf_to_megatron.main(["--model", str(folder / "hf"), "--save", str(folder / "megatron")]) == 0
    return folder


@pytest.fixture
def inputs(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for name in ("hf", "megatron"):
        shutil.copytree(sound / name, tmp_path / name)
    return tmp_path


def _to_megatron(folder: Path) -> int:
    return hf_to_megatron.main(["--model", str(folder / "hf"), "--save", str(folder / "saved")])


def _to_hf(folder: Path) -> int:
    return megatron_to_hf.main(
        ["--load", str(folder / "megatron"), "--save", str(folder / "saved"), "--format", "llava_next"]
    )


def _rejected(code: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert code == 1
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "megatron"], "no new folder, not even a hidden one"
    return error


def _truncate(file: Path, keep: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


def _files(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.rglob(pattern))
    assert found
    return found


def _truncate_common_state(megatron: Path) -> None:
    """megatron-core 0.19 reads this file of 0.16, but stores its content elsewhere itself."""
    file = megatron / "iter_0000000" / "common.pt"
    if not file.is_file():
        torch.save({"progress": {"iteration": 0}}, file)
    _truncate(file, 0.5)


WRONG_FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing shard": (
        lambda hf: _files(hf, "*.safetensors")[1].unlink(),
        ["model.safetensors.index.json names files that are not there: model-00002-of-"],
    ),
    "truncated shard": (
        lambda hf: _truncate(_files(hf, "*.safetensors")[1], 0.9),
        ["model-00002-of-", ".safetensors cannot be read"],
    ),
    "truncated header": (
        lambda hf: _truncate(_files(hf, "*.safetensors")[0], 0.001),
        ["model-00001-of-", ".safetensors cannot be read"],
    ),
    "empty shard": (lambda hf: _truncate(_files(hf, "*.safetensors")[0], 0), ["model-00001-of-", "cannot be read"]),
    "broken index": (
        lambda hf: (hf / "model.safetensors.index.json").write_text("{"),
        ["model.safetensors.index.json cannot be read"],
    ),
    "broken config": (lambda hf: (hf / "config.json").write_text("{"), ["config.json is not JSON"]),
    "config is a list": (lambda hf: (hf / "config.json").write_text("[]"), ["config.json holds no settings"]),
}


@pytest.mark.parametrize(("damage", "messages"), WRONG_FOLDERS.values(), ids=WRONG_FOLDERS.keys())
def test_damaged_folder(
    inputs: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], messages: list[str]
) -> None:
    damage(inputs / "hf")
    error = _rejected(_to_megatron(inputs), inputs, capsys)
    assert all(message in error for message in messages), error
    assert str(inputs / "hf") in error


def _edit_recipe(edit: Callable[[dict], object]) -> Callable[[Path], object]:
    def change(megatron: Path) -> None:
        file = megatron / "iter_0000000" / "recipe.json"
        content = json.loads(file.read_text())
        edit(content["recipe"])
        file.write_text(json.dumps(content))

    return change


WRONG_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated file": (
        lambda m: _truncate(_files(m, "*.distcp")[0], 0.9),
        [".distcp has", "are needed: copy the checkpoint again"],
    ),
    "missing file": (lambda m: _files(m, "*.distcp")[0].unlink(), [".distcp does not exist"]),
    "overwritten file": (
        lambda m: (f := _files(m, "*.distcp")[0]).write_bytes(b"x" * f.stat().st_size),
        ["cannot be read from", ".distcp", "Copy the checkpoint again"],
    ),
    "truncated metadata": (lambda m: _truncate(_files(m, ".metadata")[0], 0.5), [".metadata cannot be read"]),
    "truncated recipe": (lambda m: _truncate(_files(m, "recipe.json")[0], 0.5), ["recipe.json", "cannot be read"]),
    "truncated common state": (_truncate_common_state, ["common.pt cannot be read"]),
    "nothing whole": (lambda m: _files(m, "recipe.json")[0].unlink(), ["no checkpoint in", "restore iter_0000000"]),
    "no checkpoint": (
        lambda m: (shutil.rmtree(m / "iter_0000000"), (m / TRACKER).unlink()),
        ["holds no finished checkpoint"],
    ),
    "more layers than stored": (
        _edit_recipe(lambda r: r["model"]["language"].update(num_hidden_layers=5)),
        ["missing tensors:", "language_model.decoder.layers.4."],
    ),
    "fewer layers than stored": (
        _edit_recipe(lambda r: r["model"]["language"].update(num_hidden_layers=3)),
        ["unexpected tensors:", "language_model.decoder.layers.3."],
    ),
    "another width": (
        _edit_recipe(lambda r: r["model"]["language"].update(intermediate_size=70)),
        ["another shape:", "mlp.linear_fc1.weight: (144, 48), the config says (140, 48)"],
    ),
    "another tokenizer": (
        lambda m: write_tokenizer(m / "tokenizer", 290) and None,
        ["image_token_index", "its tokenizer has 290 tokens"],
    ),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), ["--tokenizer"]),
}


@pytest.mark.parametrize("tracker", [None, "", "?", "7"])
def test_a_whole_checkpoint_needs_no_tracker(inputs: Path, tracker: str | None) -> None:
    (inputs / "megatron" / TRACKER).unlink()
    if tracker is not None:
        (inputs / "megatron" / TRACKER).write_text(tracker)
    assert _to_hf(inputs) == 0


@pytest.mark.parametrize(("damage", "messages"), WRONG_CHECKPOINTS.values(), ids=WRONG_CHECKPOINTS.keys())
def test_damaged_checkpoint(
    inputs: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], messages: list[str]
) -> None:
    damage(inputs / "megatron")
    error = _rejected(_to_hf(inputs), inputs, capsys)
    assert all(message in error for message in messages), error
    assert str(inputs / "megatron") in error or "--tokenizer" in error or "tokenizer" in error


@pytest.mark.parametrize("convert", [_to_megatron, _to_hf])
def test_missing_space_is_reported_before_anything_is_written(
    inputs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    convert: Callable[[Path], int],
) -> None:
    usage = shutil.disk_usage(inputs)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    error = _rejected(convert(inputs), inputs, capsys)
    assert f"no space in {inputs}: " in error and "are to be written, 0.00 GiB are free" in error


@pytest.mark.parametrize("convert", [_to_megatron, _to_hf])
def test_a_write_that_fails(inputs: Path, capsys: pytest.CaptureFixture[str], convert: Callable[[Path], int]) -> None:
    """The system stops writing in the middle of a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = convert(inputs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = _rejected(code, inputs, capsys)
    assert f"{inputs / 'saved'}: File too large" in error


def test_a_full_disk(
    inputs: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk becomes full while writing: other processes may write to it too."""
    disk = tmp_path_factory.mktemp("disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a disk of 300 kB")
    usage = shutil.disk_usage(inputs)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    try:
        code = hf_to_megatron.main(["--model", str(inputs / "hf"), "--save", str(disk / "saved")])
        error = _rejected(code, inputs, capsys)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
    assert f"{disk / 'saved'}: No space left on device" in error


def test_values_beyond_float16(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = [TensorSpec("projector", (2,), torch.float16)]
    with pytest.raises(Exception, match=r"projector holds 70000, and float16 ends at 65504"):
        write_weights([("projector", torch.tensor([1.0, -7e4]))], tmp_path, plan=plan)


def _wait_in_the_middle(folder: Path, convert: Callable[[Path], int], in_the_middle: EventType) -> None:
    """Convert, and wait after some tensors are written. stderr goes to a file."""
    sys.stderr = (folder / "hf" / "stderr").open("w", buffering=1)
    read: list[str] = []

    def slow(tensors: type[NamedTensors]) -> None:
        get = tensors.__getitem__

        def slowly(self: NamedTensors, name: str) -> torch.Tensor:
            read.append(name)
            if len(read) == 40:
                in_the_middle.set()
                time.sleep(60)
            return get(self, name)

        tensors.__getitem__ = slowly  # type: ignore[method-assign]

    slow(MegatronTensors)
    slow(HuggingFaceTensors)
    sys.exit(convert(folder))


@pytest.mark.parametrize(
    ("end", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=lambda x: str(x)
)
@pytest.mark.parametrize("convert", [_to_megatron, _to_hf])
def test_stopped_in_the_middle(
    inputs: Path,
    capsys: pytest.CaptureFixture[str],
    convert: Callable[[Path], int],
    end: signal.Signals,
    code: int,
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once for all cases
    in_the_middle = context.Event()
    process = context.Process(target=_wait_in_the_middle, args=(inputs, convert, in_the_middle))
    process.start()
    try:
        assert in_the_middle.wait(120)
        (staging_dir,) = (path for path in inputs.iterdir() if path.name not in ("hf", "megatron"))
        assert staging_dir.name.startswith(".saved.staging-") and any(staging_dir.iterdir())
        os.kill(process.pid or 0, end)
        process.join(60)
        assert process.exitcode == code
    finally:
        process.kill()
        process.join()
    assert not (inputs / "saved").exists()
    assert "Traceback" not in (inputs / "hf" / "stderr").read_text()
    if end == signal.SIGKILL:
        assert staging_dir.exists()
        assert convert(inputs) == 0, "the leftover does not block the next call"
        assert f"{staging_dir} was left by a process that was killed" in capsys.readouterr().err
        assert (inputs / "saved").is_dir()
    else:
        assert not staging_dir.exists()
