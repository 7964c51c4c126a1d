"""Virtual environments in which tests install the package as users do. Each takes a minute, so one serves a session."""

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
TRANSFORMERS_4 = ("transformers==4.57.6", "tokenizers>=0.22,<0.23.1", "huggingface_hub<1")
QUANTIZATION = ("bitsandbytes", "accelerate")
LMMS_EVAL = "lmms-eval==0.7.3"
LMMS_EVAL_IMPORTS = (
    *("accelerate", "datasets", "einops", "evaluate", "filelock<4", "loguru", "numexpr", "openai"),
    *("pytablewriter", "python-dotenv", "pytz", "sacrebleu", "sympy", "tenacity", "zstandard"),
)
"""Of the 126 packages that lmms-eval asks for, those without which it does not start. torchvision from PyPI, which is
one of the others, does not import beside a torch for CPUs."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment that does not see the repository's folder."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        return self.folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def pip(self, *arguments: str | Path) -> None:
        result = self.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments, timeout=1200)
        assert result.returncode == 0, result.stdout + result.stderr

    def run(self, *command: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments, in the environment's folder."""
        return self.run_program(self.python, *command, timeout=timeout)

    def run_program(self, *program: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        """Run a program with its arguments, in the environment's folder."""
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment = {**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "hub")}
        return subprocess.run(
            list(map(str, program)), cwd=self.folder, env=environment, timeout=timeout, text=True, capture_output=True
        )


def inference_environment(folder: Path) -> Environment:
    """`pip install '.[inference]'` with constraints.txt."""
    environment = empty_environment(folder / "inference")
    environment.pip("-c", ROOT / "constraints.txt", f"{copy_sources(folder / 'source')}[inference]")
    return environment


def evaluation_environment(folder: Path) -> Environment:
    """`pip install '.[train]'` with constraints.txt, and as much of lmms-eval's requirements as it needs to start."""
    environment = empty_environment(folder / "evaluation")
    environment.pip("-c", ROOT / "constraints.txt", f"{copy_sources(folder / 'source')}[train]", *LMMS_EVAL_IMPORTS)
    environment.pip("--no-deps", LMMS_EVAL)
    return environment


def empty_environment(folder: Path) -> Environment:
    """A new environment with nothing but pip."""
    venv.create(folder, with_pip=True)
    return Environment(folder)


def copy_sources(folder: Path) -> Path:
    """A copy of what the package is built from, because building writes into the sources."""
    folder.mkdir(parents=True)
    for name in PACKAGE_FILES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def overlay(base: Environment, folder: Path, *packages: str) -> Environment:
    """A new environment with the packages of `base`, except that `packages` and their requirements replace them."""
    environment = empty_environment(folder)
    (environment.packages / "base.pth").write_text(f"{base.packages}\n")
    environment.pip(*packages)
    return environment
