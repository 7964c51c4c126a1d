"""Virtual environments of their own, for tests of what users install. They take a minute each: one per session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.support.launch import ROOT

PACKAGE_FILES = (
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "megatron_vlm",
    "checkpoint_convert",
    "instellavl",
)
OLDER = ("transformers==4.57.6", "tokenizers>=0.22,<0.23.1", "huggingface_hub<1")
QUANTIZERS = ("bitsandbytes", "accelerate")


@dataclass(frozen=True)
class Environment:
    """A virtual environment; nothing of the repository's folder is found in it, unless it was installed."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        return self.folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def pip(self, *arguments: str | Path) -> None:
        done = self.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments, timeout=1200)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        """Python with these arguments, in the environment's own folder."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment = {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "hub")}
        arguments = [str(self.python), *map(str, command)]
        return subprocess.run(
            arguments, cwd=self.folder, env=environment, timeout=timeout, text=True, capture_output=True
        )


def for_inference(folder: Path) -> Environment:
    """`pip install '.[inference]'`, in the versions of constraints.txt, from a copy: building leaves files behind."""
    source = folder / "source"
    for name in PACKAGE_FILES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
    venv.create(folder / "inference", with_pip=True)
    environment = Environment(folder / "inference")
    environment.pip("-c", ROOT / "constraints.txt", f"{source}[inference]")
    return environment


def on_top_of(base: Environment, folder: Path, *packages: str) -> Environment:
    """An environment that has everything `base` has, but for these packages and what they ask for in other versions."""
    venv.create(folder, with_pip=True)
    environment = Environment(folder)
    (environment.packages / "base.pth").write_text(f"{base.packages}\n")
    environment.pip(*packages)
    return environment
