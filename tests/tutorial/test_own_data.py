"""docs/own-data.md and its notebook: what they say is right, and all of it runs."""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

from megatron_vlm import cli
from tests.support.environments import copy_sources
from tests.support.hub_server import Hub, hub
from tests.support.launch import ROOT, free_port
from tools.make_notebook import Cell, notebook_text, read_page

PAGE, NOTEBOOK = ROOT / "docs" / "own-data.md", ROOT / "examples" / "own_data.ipynb"
PORTS = ("5000", "6006")
LEAST_ACCURACY = 97.0


def cells(kind: str) -> list[Cell]:
    return [cell for cell in read_page(PAGE.read_text()) if cell.kind == kind]


def commands() -> list[list[str]]:
    """The words of each `megatron-vlm` command of the page, and of training."""
    found = []
    for cell in cells("sh"):
        for line in cell.source.replace("\\\n", " ").splitlines():
            if line.startswith("megatron-vlm ") or " megatron_vlm.train " in line:
                words = shlex.split(line.partition(" > ")[0])
                start = words.index("megatron-vlm" if "megatron-vlm" in words else "megatron_vlm.train")
                found.append([*(["train"] if words[start] == "megatron_vlm.train" else []), *words[start + 1 :]])
    return found


def test_the_scripts_are_those_of_the_example() -> None:
    scripts = {cell.file: cell.source + "\n" for cell in cells("python")}
    assert scripts == {path.name: path.read_text() for path in (ROOT / "examples" / "digits").glob("*.py")}


def test_the_notebook_is_made_from_the_page() -> None:
    assert NOTEBOOK.read_text() == notebook_text(PAGE, "../docs"), "run tools/make_notebook.py"


def test_a_python_block_needs_a_file_name() -> None:
    with pytest.raises(ValueError, match="no file is named"):
        read_page("Text.\n\n```python\npass\n```\n")


def test_every_flag_exists() -> None:
    names = {words[0] for words in commands()}
    assert names >= {"convert-dataset", "init", "show-sample", "data-report", "plan", "train", "export", "ask", "serve"}
    for words in commands():
        kind = words[1:2] if words[0] == "convert-dataset" else []
        help_text = io.StringIO()
        with redirect_stdout(help_text), pytest.raises(SystemExit):
            cli.main([words[0], *kind, "--help"])
        for flag in (word for word in words if word.startswith("--")):
            assert flag in help_text.getvalue().split() or f"[{flag}" in help_text.getvalue(), (words, flag)


def test_the_installed_extras_exist() -> None:
    (extras,) = re.findall(r"pip install '\.\[([\w,]+)\]'", PAGE.read_text())
    known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(extras.split(",")) <= set(known)


def test_the_steps_before_training_on_a_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(ROOT / "examples" / "digits" / "digits.py"))
    script["main"].__globals__["VERSIONS"] = 1  # writing twenty of each image takes seconds
    script["main"]()
    tables = {name: Path(name).read_text().splitlines(keepends=True) for name in ("train.csv", "test.csv")}
    assert [len(lines) for lines in tables.values()] == [1 + 1347, 1 + 450 * 3]
    for name, lines in tables.items():
        Path(name).write_text("".join(lines[:41]))
    done = []
    for words in commands():
        if words[0] == "train":
            break
        assert cli.main(words) == 0, words
        done.append(words[0])
    assert done == ["convert-dataset", "convert-dataset", "init", "show-sample", "data-report", "plan"]
    assert Path("report/index.html").is_file()


def upload(home: Path, server: Hub) -> dict[str, str]:
    """Environment of `hf` with a server in the hub's stead."""
    return {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": "hf_test", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


def test_a_folder_is_uploaded(tmp_path: Path) -> None:
    (line,) = [cell.source for cell in cells("sh") if cell.source.startswith("hf ")]
    folder = tmp_path / shlex.split(line)[-1]
    folder.mkdir(parents=True)
    contents = {
        "config.json": b"{}",
        "README.md": b"---\nlibrary_name: transformers\n---\n",
        "model.safetensors": b"1" * 999,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with hub() as server:
        environment = {**os.environ, "PATH": path, **upload(tmp_path / "home", server)}
        done = subprocess.run(["bash", "-ec", line], cwd=tmp_path, env=environment, capture_output=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
    assert server.files == {"me/digits": contents} and "hf_test" in server.tokens


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the built wheel installs; the other packages are those of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    sources = copy_sources(folder / "source")
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sources], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, timeout=300)
    return folder / "site"


@pytest.fixture
def environment(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Sets the environment's variables and an empty working directory; ends the page's servers afterwards."""
    path = os.pathsep.join([str(installed / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with hub() as server:
        for name, value in {"PATH": path, "PYTHONPATH": str(installed), **upload(tmp_path / "home", server)}.items():
            monkeypatch.setenv(name, value)
        yield server
    for file in work.glob("*.pid"):
        with suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def with_free_ports(text: str) -> str:
    for port in PORTS:
        text = text.replace(port, str(free_port()))
    return text


def check_results(outputs: str, server: Hub) -> None:
    accuracy = re.search(r"Which digit is this\? .*: ([\d.]+) %", outputs)
    assert accuracy and float(accuracy[1]) >= LEAST_ACCURACY, outputs[-6000:]
    truth = Path("test.csv").read_text().splitlines()[1].split(",")[-1]
    assert f'"content":"{truth}"' in outputs.replace(" ", "")
    assert f"\n{truth}\n" in outputs  # of ask
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(server.files["me/digits"])


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_page_runs(environment: Hub) -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import megatron_vlm; print(megatron_vlm.__file__)"], capture_output=True, text=True
    ).stdout
    assert found.startswith(os.environ["PYTHONPATH"])
    outputs = ""
    for cell in read_page(with_free_ports(PAGE.read_text())):
        if cell.kind == "python":
            Path(cell.file).write_text(cell.source)
        elif cell.kind == "sh":
            done = subprocess.run(["bash", "-ec", cell.source], text=True, capture_output=True, timeout=2400)
            assert done.returncode == 0, f"{cell.source}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
            outputs += f"{done.stdout}\n"
    check_results(outputs, environment)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_notebook_runs(environment: Hub) -> None:
    import nbclient
    import nbformat

    content = nbformat.reads(with_free_ports(NOTEBOOK.read_text()), as_version=4)
    nbformat.validate(content)
    nbclient.NotebookClient(content, timeout=2400, kernel_name="python3").execute()
    printed = [output["text"] for cell in content.cells for output in cell.get("outputs", []) if "text" in output]
    check_results("\n".join(printed), environment)
