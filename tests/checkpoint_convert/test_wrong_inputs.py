"""Wrong inputs and conversions that end early: one message that names the key or the file, and no folder.

Wrong weights and configs on the way to Megatron are in test_conversion.py; here are files that are damaged, disks that
are full, checkpoints that are none, and processes that are stopped.
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

from benchmarks.random_folder import write_random_folder
from benchmarks.random_tokenizer import write_tokenizer
from checkpoint_convert import hf_to_megatron, megatron_to_hf
from checkpoint_convert.huggingface.safetensors import FolderTensors, Planned, write_weights
from checkpoint_convert.mapping.lazy_tensors import NamedTensors
from checkpoint_convert.mapping.param_map import HuggingFaceTensors, MegatronTensors
from megatron_vlm.config import ModelConfig, recipe_from_dict
from tests.training.tiny_run import MODEL


def small_model() -> ModelConfig:
    return recipe_from_dict({"model": MODEL}).model


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, in several files, and `megatron`, the checkpoint of it."""
    folder, model = tmp_path_factory.mktemp("sound"), small_model()
    model.image_token_index = write_tokenizer(folder / "words")
    write_random_folder(folder / "whole", folder / "words", model, torch.float32)
    tensors = FolderTensors(folder / "whole", "whole")
    shutil.copytree(folder / "whole", folder / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    plan = [Planned(name, tensors.shape(name), torch.float32) for name in tensors]
    write_weights(tensors.items(), folder / "hf", shard_bytes=200_000, plan=plan)
    assert hf_to_megatron.main(["--model", str(folder / "hf"), "--save", str(folder / "megatron")]) == 0
    return folder


@pytest.fixture
def inputs(sound: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    for name in ("hf", "megatron"):
        shutil.copytree(sound / name, tmp_path / name)
    return tmp_path


def _to_megatron(folder: Path) -> int:
    return hf_to_megatron.main(["--model", str(folder / "hf"), "--save", str(folder / "saved")])


def _to_hf(folder: Path) -> int:
    return megatron_to_hf.main(
        ["--load", str(folder / "megatron"), "--save", str(folder / "saved"), "--format", "llava_next"]
    )


def _refused(code: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    told = capsys.readouterr().err
    assert code == 1
    assert told.count("error: ") == 1 and "Traceback" not in told
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "megatron"], "nothing new, hidden ones included"
    return told


def _cut(file: Path, keep: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


def _files(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.rglob(pattern))
    assert found
    return found


def _cut_common_state(megatron: Path) -> None:
    """megatron-core 0.19 still reads what 0.16 wrote to this file, and puts it elsewhere itself."""
    file = megatron / "iter_0000000" / "common.pt"
    if not file.is_file():
        torch.save({"progress": {"iteration": 0}}, file)
    _cut(file, 0.5)


WRONG_FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing shard": (
        lambda hf: _files(hf, "*.safetensors")[1].unlink(),
        ["model.safetensors.index.json names files that are not there: model-00002-of-"],
    ),
    "cut shard": (
        lambda hf: _cut(_files(hf, "*.safetensors")[1], 0.9),
        ["model-00002-of-", ".safetensors cannot be read"],
    ),
    "cut in the header": (
        lambda hf: _cut(_files(hf, "*.safetensors")[0], 0.001),
        ["model-00001-of-", ".safetensors cannot be read"],
    ),
    "empty shard": (lambda hf: _cut(_files(hf, "*.safetensors")[0], 0), ["model-00001-of-", "cannot be read"]),
    "broken index": (
        lambda hf: (hf / "model.safetensors.index.json").write_text("{"),
        ["model.safetensors.index.json cannot be read"],
    ),
    "broken config": (lambda hf: (hf / "config.json").write_text("{"), ["config.json is not JSON"]),
    "config of another kind": (lambda hf: (hf / "config.json").write_text("[]"), ["config.json holds no settings"]),
}


@pytest.mark.parametrize(("spoil", "messages"), WRONG_FOLDERS.values(), ids=WRONG_FOLDERS.keys())
def test_damaged_folder(
    inputs: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], messages: list[str]
) -> None:
    spoil(inputs / "hf")
    told = _refused(_to_megatron(inputs), inputs, capsys)
    assert all(message in told for message in messages), told
    assert str(inputs / "hf") in told


def _edit_recipe(edit: Callable[[dict], object]) -> Callable[[Path], object]:
    def change(megatron: Path) -> None:
        file = megatron / "iter_0000000" / "recipe.json"
        content = json.loads(file.read_text())
        edit(content["recipe"])
        file.write_text(json.dumps(content))

    return change


WRONG_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "cut file": (
        lambda m: _cut(_files(m, "*.distcp")[0], 0.9),
        [".distcp has", "are needed: copy the checkpoint again"],
    ),
    "missing file": (lambda m: _files(m, "*.distcp")[0].unlink(), [".distcp is not there"]),
    "overwritten file": (
        lambda m: (f := _files(m, "*.distcp")[0]).write_bytes(b"x" * f.stat().st_size),
        ["cannot be read from", ".distcp", "Copy the checkpoint again"],
    ),
    "cut metadata": (lambda m: _cut(_files(m, ".metadata")[0], 0.5), [".metadata cannot be read"]),
    "cut recipe": (lambda m: _cut(_files(m, "recipe.json")[0], 0.5), ["recipe.json", "cannot be read"]),
    "cut common state": (_cut_common_state, ["common.pt cannot be read"]),
    "no iteration": (lambda m: (m / "latest_checkpointed_iteration.txt").write_text("?"), ["cannot be read ("]),
    "iteration that is gone": (
        lambda m: (m / "latest_checkpointed_iteration.txt").write_text("7"),
        ["names iter_0000007, which is missing"],
    ),
    "no checkpoint": (
        lambda m: (m / "latest_checkpointed_iteration.txt").unlink(),
        ["holds no finished checkpoint"],
    ),
    "more layers than stored": (
        _edit_recipe(lambda r: r["model"]["language"].update(num_hidden_layers=5)),
        ["missing:", "language_model.decoder.layers.4."],
    ),
    "fewer layers than stored": (
        _edit_recipe(lambda r: r["model"]["language"].update(num_hidden_layers=3)),
        ["no place in this model:", "language_model.decoder.layers.3."],
    ),
    "another width": (
        _edit_recipe(lambda r: r["model"]["language"].update(intermediate_size=70)),
        ["another shape:", "mlp.linear_fc1.weight: (144, 48), the config says (140, 48)"],
    ),
    "another tokenizer": (
        lambda m: write_tokenizer(m / "tokenizer", 290) and None,
        ["image_token_index", "its tokenizer has 290 words"],
    ),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), ["--tokenizer"]),
}


@pytest.mark.parametrize(("spoil", "messages"), WRONG_CHECKPOINTS.values(), ids=WRONG_CHECKPOINTS.keys())
def test_damaged_checkpoint(
    inputs: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], messages: list[str]
) -> None:
    spoil(inputs / "megatron")
    told = _refused(_to_hf(inputs), inputs, capsys)
    assert all(message in told for message in messages), told
    assert str(inputs / "megatron") in told or "--tokenizer" in told or "tokenizer" in told


@pytest.mark.parametrize("convert", [_to_megatron, _to_hf])
def test_no_space_is_told_before_anything_is_written(
    inputs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    convert: Callable[[Path], int],
) -> None:
    usage = shutil.disk_usage(inputs)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    told = _refused(convert(inputs), inputs, capsys)
    assert f"no space in {inputs}: " in told and "are to be written, 0.00 GiB are free" in told


@pytest.mark.parametrize("convert", [_to_megatron, _to_hf])
def test_a_write_that_fails(inputs: Path, capsys: pytest.CaptureFixture[str], convert: Callable[[Path], int]) -> None:
    """The system refuses to write on, as it does on a full disk, in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = convert(inputs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = _refused(code, inputs, capsys)
    assert f"{inputs / 'saved'}: File too large" in told


def test_a_full_disk(
    inputs: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full in earnest, and only found so while writing: others write to disks too."""
    disk = tmp_path_factory.mktemp("disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a disk of 300 kB")
    usage = shutil.disk_usage(inputs)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    try:
        code = hf_to_megatron.main(["--model", str(inputs / "hf"), "--save", str(disk / "saved")])
        told = _refused(code, inputs, capsys)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
    assert f"{disk / 'saved'}: No space left on device" in told


def test_what_half_precision_cannot_hold(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = [Planned("projector", (2,), torch.float16)]
    with pytest.raises(Exception, match=r"projector holds 70000, and float16 ends at 65504"):
        write_weights([("projector", torch.tensor([1.0, -7e4]))], tmp_path, plan=plan)


def _stand_still(folder: Path, convert: Callable[[Path], int], in_the_middle: EventType) -> None:
    """Convert, and stop after some of the tensors are written. What is told goes to a file."""
    sys.stderr = (folder / "hf" / "told").open("w", buffering=1)
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
    process = context.Process(target=_stand_still, args=(inputs, convert, in_the_middle))
    process.start()
    try:
        assert in_the_middle.wait(120)
        (making,) = (path for path in inputs.iterdir() if path.name not in ("hf", "megatron"))
        assert making.name.startswith(".saved.staging-") and any(making.iterdir())
        os.kill(process.pid or 0, end)
        process.join(60)
        assert process.exitcode == code
    finally:
        process.kill()
        process.join()
    assert not (inputs / "saved").exists()
    assert "Traceback" not in (inputs / "hf" / "told").read_text()
    if end == signal.SIGKILL:
        assert making.exists()
        assert convert(inputs) == 0, "what is left is not in the way of the next call"
        assert f"{making} was left by a process that was killed" in capsys.readouterr().err
        assert (inputs / "saved").is_dir()
    else:
        assert not making.exists()
