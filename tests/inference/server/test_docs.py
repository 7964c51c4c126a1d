"""The curl lines and the Python of docs/serving.md, as they stand there but for the address."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.checkpoint_convert.whole_model import WIDE, picture
from tests.inference.server.running import RunningServer
from tests.support.launch import ROOT

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:5000"


def test_the_curl_lines(server: RunningServer) -> None:
    commands = re.findall(r"^(curl .*?)\n(?=\n|```)", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert ADDRESS in command
        done = subprocess.run(
            ["bash", "-c", command.replace(ADDRESS, server.url)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert "choices" in answer or "text" in answer or answer["ready"], answer


def test_the_python(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```py\n(.*?)```", PAGE, flags=re.DOTALL)
    picture(WIDE).save(tmp_path / "shape.png")
    monkeypatch.chdir(tmp_path)
    exec(code.replace(ADDRESS, server.url).replace('"instruct"', '"tiny"'), {})
    assert capsys.readouterr().out
