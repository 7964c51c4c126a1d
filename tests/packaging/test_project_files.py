"""Files that other tools read agree with the package and with each other."""

from __future__ import annotations

import re
import tomllib

import yaml

import megatron_vlm
from tests.support.launch import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_citation_has_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == megatron_vlm.__version__
    assert citation["license"] == PROJECT["license"]


def test_every_package_that_make_installs_has_an_exact_version() -> None:
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    wanted = [
        *PROJECT["dependencies"],
        *(line for name in extras if name not in ("cuda", "gpu", "eval") for line in extras[name]),
    ]
    names = {re.match(r"[\w-]+", line).group().lower() for line in wanted}  # type: ignore[union-attr]
    assert names - pinned == {PROJECT["name"]}


def test_the_workflow_runs_what_developers_run() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands == {"lint": ["make lint PYTHON=python"], "test": [".ci/run"]}
    assert jobs["lint"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]


def test_hooks_are_commands_of_the_environment() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["entry"].split()[0] for hook in repository["hooks"]} == {".venv/bin/python", ".venv/bin/lint-imports"}
