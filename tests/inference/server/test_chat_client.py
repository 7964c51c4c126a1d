"""`megatron-vlm chat` and `megatron-vlm ask`: answers, several turns, and what is said when something is wrong."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.commands.chat_client import ChatClient, ChatError, main, printable
from megatron_vlm.text_generation import ask
from tests.checkpoint_convert.whole_model import WIDE, picture
from tests.inference.server.running import RunningServer, image_part, run_server
from tests.support.launch import ROOT


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "shape.png"
    picture(WIDE).save(file)
    return file


def _address(server: RunningServer) -> str:
    return server.url.removeprefix("http://")


def test_a_conversation(
    server: RunningServer, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [image_part(picture(WIDE)), {"type": "text", "text": "What is the colour?"}]
    messages = [{"role": "user", "content": first}]
    one = server.chat(None, messages=messages)["choices"][0]["message"]
    messages += [one, {"role": "user", "content": "A red dog?"}]
    two = server.chat(None, messages=messages)["choices"][0]["message"]
    alone = server.chat("A red dog?")["choices"][0]["message"]
    lines = ["What is the colour?", "A red dog?", "/new", "A red dog?", "/quit", "never asked"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main([_address(server), "--image", str(image), "--max-tokens", "8"]) == 0
    expected = "".join(printable(message["content"]) + "\n" for message in (one, two, alone))
    assert capsys.readouterr().out == expected


def test_an_image_given_in_the_conversation(
    server: RunningServer, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = server.chat([image_part(picture(WIDE)), {"type": "text", "text": "Why?"}])["choices"][0]["message"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {image}\n/image nowhere.png\nWhy?\n"))
    assert main([server.url, "--max-tokens", "8"]) == 0
    captured = capsys.readouterr()
    assert captured.out == printable(answer["content"]) + "\n"
    assert captured.err == "nowhere.png is no file.\n"


def test_errors_are_one_readable_line(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(address: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("What?\n"))
        assert main([address, *arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert error(f"127.0.0.1:{port}") == (
        f"error: There is no server at 127.0.0.1:{port}. Start one: megatron-vlm serve MODEL --port {port}"
    )
    assert "write HOST:PORT" in error("ftp://somewhere")
    assert "Write HOST:PORT" in error("host:port")
    assert "temperature: Input should be less than or equal to 100" in error(_address(server), "--temperature", "1000")
    assert "No such file" in error(_address(server), "--image", str(tmp_path / "none.png"))
    (tmp_path / "text.png").write_text("no image")
    assert "the image cannot be read" in error(_address(server), "--image", str(tmp_path / "text.png"))


def test_a_server_with_keys(server: RunningServer, tmp_path: Path) -> None:
    with run_server(server.engine, api_keys=("secret", "other")) as locked:
        with pytest.raises(ChatError, match="needs an API key.*--api-key-file FILE"):
            list(ChatClient(_address(locked)).ask("What?", []))
        with pytest.raises(ChatError, match="none of its keys"):
            list(ChatClient(_address(locked), "wrong").ask("What?", []))
        assert list(ChatClient(_address(locked), "other", max_tokens=2, seed=1).ask("What?", []))
        assert locked.client.get("/health").status_code == 200
        assert locked.client.get("/v1/models").status_code == 401
        assert locked.client.get("/metrics").status_code == 401
        assert locked.client.put("/api", json={"prompts": ["a"]}).json()["message"].startswith("This server needs")


def test_control_characters_are_not_printed() -> None:
    assert printable("a\x1b[31mb\r\n\tä\u202e") == "a\ufffd[31mb\ufffd\n\tä\ufffd"


def test_ask_answers_like_the_server(server: RunningServer, folder: Path, image: Path) -> None:
    content = [image_part(picture(WIDE)), {"type": "text", "text": "What is the colour?"}]
    expected = server.chat(content, max_tokens=12)["choices"][0]["message"]["content"]
    command = [sys.executable, "-W", "ignore", "-m", "megatron_vlm.cli", "ask", folder / "source", "--image", image]
    done = subprocess.run(
        [*command, "--max-tokens", "12", "What is the colour?"], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == printable(expected) + "\n"


def test_ask_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert ask.main([*arguments]) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    assert error(str(tmp_path / "none"), "What?").startswith(str(tmp_path / "none"))
    assert "none.png: No such file" in error(str(tmp_path), "--image", str(tmp_path / "none.png"), "What?")
    assert "world size = 1, but tensor x pipeline parallel size = 2" in error(
        str(tmp_path), "What?", "--tensor-model-parallel-size", "2"
    )
