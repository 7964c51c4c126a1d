"""Source files of packages that are not installed: what they define, and functions of theirs run alone.

Packages such as vLLM need a GPU and hundreds of others. A test of what they expect of us reads their published files.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def download_wheel(requirement: str, folder: Path, timeout: float = 600) -> Path:
    """Download the wheel of `name==version`, without what it needs; it is not installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def read_from_wheel(wheel: Path, folder: str, suffix: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each file below `folder` whose name ends with `suffix`."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(folder) and name.endswith(suffix):
                yield name, archive.read(name).decode()


class PublishedModule:
    """One module of a wheel."""

    def __init__(self, wheel: Path, name: str) -> None:
        """`name` is dotted, as in an import; KeyError if the wheel has no such module."""
        with zipfile.ZipFile(wheel) as archive:
            self.text = archive.read(f"{name.replace('.', '/')}.py").decode()
        self.name, self._tree = name, ast.parse(self.text)

    def dict_entries(self) -> dict[str, Any]:
        """Entries of all dictionary literals whose key is a text and whose value is a constant or a tuple of them."""
        entries: dict[str, Any] = {}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(key.value, str) and _is_literal(value):
                        entries[key.value] = ast.literal_eval(value)
        return entries

    def definition(self, path: str) -> ast.FunctionDef | ast.ClassDef:
        """A function or class, `Class.method` for a method."""
        body = self._tree.body
        for name in path.split("."):
            (node,) = (n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name)
            body = node.body
        return node

    def function(self, path: str, **names: Any) -> Any:
        """A function of the module, compiled alone. `names` are what its body uses of the module."""
        node = self.definition(path)
        assert isinstance(node, ast.FunctionDef)
        node.decorator_list, node.returns = [], None
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            argument.annotation = None
        code = ast.fix_missing_locations(ast.Module([node], []))
        namespace = dict(names)
        exec(compile(code, self.name, "exec"), namespace)
        return namespace[node.name]


def _is_literal(node: ast.expr) -> bool:
    if isinstance(node, ast.Tuple):
        return all(map(_is_literal, node.elts))
    return isinstance(node, ast.Constant)
