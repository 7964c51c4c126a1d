"""The command `megatron-vlm`: its help, its sub-commands, and what it answers to mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.cli import GROUPS, main
from tests.data.helpers import mixed_folder
from tests.support.random_models import write_llava_next

COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_lists_every_command_on_a_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert f"  {name:<18} {command.help}" in lines
    assert max(map(len, lines)) <= 100


def test_without_arguments_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: megatron-vlm COMMAND" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_vlm import __version__

    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"megatron-vlm {__version__}, Python 3.") and "torch 2." in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_own_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: megatron-vlm {name} ")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("trian", "there is no command 'trian'. Did you mean train?"),
        ("prepare_shards", "Did you mean prepare-shards?"),
        ("fly", "All commands: megatron-vlm --help"),
    ],
)
def test_a_wrong_command(name: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert answer in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder, with annotations and images beside it."""
    root = tmp_path_factory.mktemp("model")
    write_llava_next(root / "hf")
    mixed_folder(root, 8).write()
    return root


def data_flags(model: Path) -> list[str]:
    flags = {"--data-path": "train.json", "--image-folder": "images", "--pretrained-checkpoint": "hf"}
    return ["--seq-length", "1024", *(text for flag, name in flags.items() for text in (flag, str(model / name)))]


def test_data_commands_take_model_and_tokenizer_from_where_training_starts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show-sample", "--index", "0", "--json", *data_flags(model)]) == 0
    view = json.loads(capsys.readouterr().out)
    (image,) = view["images"]
    index = json.loads((model / "hf" / "config.json").read_text())["image_token_index"]
    assert view["ids"].count(index) == image["num_tokens"] > 0
    assert main(["data-report", "--output", str(tmp_path / "r"), "--examples", "1", *data_flags(model)]) == 0
    assert f"because {model / 'hf'} has none" in (tmp_path / "r" / "index.html").read_text()


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_help_imports_neither_torch_nor_megatron_core() -> None:
    code = (
        "import sys\n"
        "from megatron_vlm.cli import main\n"
        "try: main({arguments})\n"
        "except SystemExit: pass\n"
        "print(sorted({{'torch', 'megatron', 'transformers', 'numpy'}} & set(sys.modules)))"
    )
    for arguments in (["--help"], ["train", "--help"], ["plan", "--trian-iters", "3"]):
        done = run(code.format(arguments=arguments))
        assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


def test_data_commands_need_no_megatron_core() -> None:
    code = "import sys\nsys.modules.update(megatron=None, psutil=None)\nfrom megatron_vlm.cli import main\n"
    for name in GROUPS["data"]:
        code += f"try: main([{name!r}, '--help'])\nexcept SystemExit as exit: assert exit.code == 0\n"
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(GROUPS["data"])


def test_a_model_from_hugging_face_is_looked_up_without_megatron_core(model: Path) -> None:
    """A checkpoint is not: that is one error, which says what to install."""
    arguments = ["show-sample", "--index", "0", *data_flags(model)]
    code = "import sys\nsys.modules.update(megatron=None, psutil=None)\nfrom megatron_vlm.cli import main\n"
    done = run(f"{code}sys.exit(main({arguments}))")
    assert done.returncode == 0 and done.stdout.startswith("sample 0: "), done.stderr
    (model / "megatron").mkdir(exist_ok=True)
    arguments = [re.sub(r"/hf$", "/megatron", argument) for argument in arguments]
    done = run(f"{code}sys.exit(main({arguments}))")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "training.pretrained_checkpoint: training and conversion need megatron-core, psutil" in done.stderr


@pytest.mark.parametrize(
    "call",
    [
        "sys.exit(megatron_vlm.cli.main(['export', '--help']))",
        "try: train._train(Recipe())\nexcept Exception as error: train._fail(error)",
    ],
)
def test_missing_megatron_core_is_one_line(call: str) -> None:
    done = run(
        "import sys\nsys.modules.update(megatron=None, psutil=None)\n"
        f"import megatron_vlm.cli\nfrom megatron_vlm import train\nfrom megatron_vlm.config import Recipe\n{call}"
    )
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert "need megatron-core, psutil, which is not installed: pip install 'megatron-vlm[train]'" in line
