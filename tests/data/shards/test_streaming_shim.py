"""mosaicml-streaming can be imported, and the error without it contains the install command."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest

from megatron_vlm.data.shards.streaming_shim import import_streaming


def test_import() -> None:
    assert import_streaming().MDSWriter


def test_error_if_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "streaming":
            raise ModuleNotFoundError("No module named 'streaming'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "streaming", raising=False)
    with pytest.raises(ImportError, match="pip install --no-deps mosaicml-streaming==0.13.0"):
        import_streaming()
