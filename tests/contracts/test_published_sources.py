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

ON_PYPI = [published for published in signatures.ALL if published.package != signatures.AITER_COMMIT]


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
