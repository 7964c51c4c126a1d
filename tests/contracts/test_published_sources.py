"""The recorded signatures are those of the published sources. Downloads from PyPI: run by `make test-full` only."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.contracts import signatures
from tests.contracts.signatures import Published

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

ON_PYPI = [published for published in signatures.ALL if "@" not in published.package]


@pytest.fixture(scope="session")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


def _archive(folder: Path, package: str, version: str) -> Path:
    """The pure Python wheel, or else the source archive; nothing is built."""
    target = folder / f"{package}-{version}"
    if not target.exists():
        # flash-attn has no wheels; its setup reads torch's version, and compiles nothing with this variable.
        kind = ["--no-binary=:all:", "--no-build-isolation"] if package == "flash-attn" else ["--only-binary=:all:"]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind, f"{package}=={version}"]
        environment = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
        subprocess.run([*command, "-d", str(target)], check=True, env=environment, timeout=400)
    (archive,) = target.iterdir()
    return archive


def _source(archive: Path, path: str) -> str:
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).read(path).decode()
    with tarfile.open(archive) as tar:
        (member,) = [name for name in tar.getnames() if name.partition("/")[2] == path]
        file = tar.extractfile(member)
        assert file is not None
        return file.read().decode()


def _signature(source: str, name: str) -> str:
    """Parameters with their defaults, without types."""
    body: list[ast.stmt] = ast.parse(source).body
    for part in name.split("."):
        (node,) = [item for item in body if isinstance(item, ast.FunctionDef | ast.ClassDef) and item.name == part]
        body = node.body
    assert isinstance(node, ast.FunctionDef)
    for argument in [*node.args.args, *node.args.kwonlyargs]:
        argument.annotation = None
    return ast.unparse(node.args)


def _normalized(signature: str) -> str:
    function = ast.parse(f"def f({signature}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return ast.unparse(function.args)


@pytest.mark.parametrize("published", ON_PYPI, ids=[f"{item.id} of {item.path}" for item in ON_PYPI])
def test_signature(published: Published, downloads: Path) -> None:
    source = _source(_archive(downloads, published.package, published.version), published.path)
    assert _signature(source, published.name) == _normalized(published.signature)


@pytest.mark.parametrize("published", signatures.FLASH_ATTN_2 + signatures.AITER[:1], ids=lambda item: item.package)
def test_packages_export_the_function(published: Published, downloads: Path) -> None:
    """We import it from the top of the package."""
    archive = _archive(downloads, published.package, published.version)
    exported = _source(archive, published.path.partition("/")[0] + "/__init__.py")
    module = published.path.removesuffix(".py").partition("/")[2].replace("/", ".")
    assert published.name in exported or f"from .{module} import *" in exported


@pytest.mark.parametrize("published", signatures.TE_AUTOCAST, ids=lambda item: item.version)
def test_transformer_engine_exports_what_we_import(published: Published, downloads: Path) -> None:
    exported = _source(
        _archive(downloads, published.package, published.version), "transformer_engine/pytorch/__init__.py"
    )
    for name in ("DotProductAttention", "fp8_autocast", "Linear"):
        assert f"import {name}\n" in exported, name


@pytest.mark.parametrize("published", signatures.TE_LINEAR, ids=lambda item: item.version)
def test_weight_gradients_are_fused_by_an_attribute(published: Published, downloads: Path) -> None:
    """It is set after DDP has made the gradient buffers: the layer must read it at every call."""
    source = _source(_archive(downloads, published.package, published.version), published.path)
    (layer,) = [item for item in ast.parse(source).body if isinstance(item, ast.ClassDef) and item.name == "Linear"]
    reads = [
        node
        for method in layer.body
        if isinstance(method, ast.FunctionDef) and method.name != "__init__"
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and node.attr == "fuse_wgrad_accumulation"
    ]
    (init,) = [item for item in layer.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    assert "self.fuse_wgrad_accumulation = fuse_wgrad_accumulation" in ast.unparse(init)
    assert reads
