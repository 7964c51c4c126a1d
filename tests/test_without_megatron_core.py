"""Settings, data, commands and instellavl import and work without megatron-core."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.data.helpers import mixed_folder
from tests.support.launch import ROOT

SCRIPT = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "megatron":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
for package in ("megatron_vlm.config", "megatron_vlm.data", "megatron_vlm.commands", "instellavl"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(module.name)

from megatron_vlm.commands import make_data_folders, prepare_shards
assert prepare_shards.main(sys.argv[1:]) == 0
assert make_data_folders.main([]) == 0

parts = ("model", "training", "inference", "runtime.megatron_patches", "runtime.process_groups", "runtime.launch")
loaded = [name for name in sys.modules if name.startswith(tuple(f"megatron_vlm.{part}" for part in parts))]
assert not loaded, loaded
"""


def test_data_tools_without_megatron_core(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, 3)
    arguments = ["--annotations", folder.write(), "--image-folder", folder.images, "--output", tmp_path / "shards"]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *map(str, arguments), "--processes", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "3 samples read = 3 written" in result.stdout
