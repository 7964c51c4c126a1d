"""Tools are scripts, not a package: loaded by their path."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).parent.parent / "tools"


def load_tool(name: str) -> Any:
    """The module of tools/<name>.py, for tests that spare themselves another process."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
