"""Talk to a text-generation server in a terminal: several turns, images, answers as they are generated.

megatron-vlm chat 127.0.0.1:5000
megatron-vlm chat 127.0.0.1:5000 --image shape.png

Where the input is no terminal, each line is a question.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import mimetypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_vlm.commands.failures import describe

_HELP = """\
  /image FILE   send an image with the next question
  /new          begin a new conversation
  /quit         end (also Ctrl-D); Ctrl-C stops an answer"""
_TIMEOUT = 600.0
"""Seconds without a byte after which the server is given up."""
_PRINTED_CONTROLS = "\n\t"


class ChatError(Exception):
    """Why there is no answer; for the person at the terminal."""


class ChatClient:
    """A conversation with a server."""

    def __init__(self, server: str, api_key: str | None = None, **fields: Any) -> None:
        """`server` is HOST:PORT or a URL; `fields` are sent with each request. Raises ChatError for a malformed one."""
        try:
            parts = urlsplit(server if "//" in server else f"http://{server}")
            self._port = parts.port
        except ValueError as error:
            raise ChatError(f"{server} is no address: {error}. Write HOST:PORT.") from error
        if not parts.hostname or parts.scheme not in ("http", "https"):
            raise ChatError(f"{server} is no address: write HOST:PORT or http(s)://HOST:PORT.")
        self._parts, self._host, self._fields = parts, parts.hostname, fields
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.messages: list[dict[str, Any]] = []

    def ask(self, question: str, images: list[Path]) -> Iterator[str]:
        """The pieces of the answer. Question and answer become part of the conversation when the answer is complete.

        Raises:
            ChatError: an image cannot be read, or the server gives no answer.
        """
        parts = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
        content: Any = [*parts, {"type": "text", "text": question}] if parts else question
        asked = [*self.messages, {"role": "user", "content": content}]
        answer = ""
        for piece in self._stream({"messages": asked, "stream": True} | self._fields):
            answer += piece
            yield piece
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _stream(self, body: dict[str, Any]) -> Iterator[str]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_TIMEOUT)
        path = self._parts.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        try:
            with contextlib.suppress(BrokenPipeError):  # the server may answer a large request before it is whole
                connection.request("POST", path, json.dumps(body), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ChatError(_error_message(response))
            for line in response:
                text = line.decode("utf-8", "replace").strip()
                if text == "data: [DONE]":
                    return
                if text.startswith("data: "):
                    yield from _pieces(json.loads(text[6:]))
            raise ChatError("The server ended in the middle of the answer.")
        except TimeoutError as error:
            raise ChatError(f"The server sent nothing for {_TIMEOUT:.0f} s.") from error
        except ConnectionRefusedError as error:
            raise ChatError(
                f"There is no server at {self._parts.netloc}. Start one: megatron-vlm serve MODEL --port {self._port}"
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ChatError(
                f"The connection to {self._parts.netloc} failed: {error or type(error).__name__}"
            ) from error
        finally:
            connection.close()


def _data_url(image: Path) -> str:
    try:
        content = image.read_bytes()
    except OSError as error:
        raise ChatError(f"{image}: {error.strerror or error}. Give another file.") from error
    kind = mimetypes.guess_type(image.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _pieces(event: dict[str, Any]) -> Iterator[str]:
    if "error" in event:
        raise ChatError(str(event["error"].get("message", event["error"])))
    for choice in event.get("choices", []):
        if text := choice["delta"].get("content"):
            yield text


def _error_message(response: http.client.HTTPResponse) -> str:
    content = response.read(1 << 20).decode("utf-8", "replace")
    try:
        message = str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = (
            f"The server answered with status {response.status} {response.reason}. Is it a text-generation server?"
        )
    if response.status == 429 and (wait := response.getheader("Retry-After")):
        message += f" Ask again in {wait} s."
    if response.status == 401:
        message += " Give it in a file: --api-key-file FILE"
    return message


def printable(text: str) -> str:
    """Without control characters, which could change the terminal."""
    return "".join(c if c.isprintable() or c in _PRINTED_CONTROLS else "\ufffd" for c in text)


class _Terminal:
    """Reads questions and prints answers."""

    def __init__(self, client: ChatClient, images: list[Path]) -> None:
        self._client, self._images = client, images
        self._interactive = sys.stdin.isatty()

    def run(self) -> int:
        """Exit code: 1 if the input is no terminal and a question had no answer."""
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (arrow keys in input())
            print(f"Ask a question.\n{_HELP}")
        while True:
            try:
                line = input("\n> " if self._interactive else "").strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                return 0
            if line in ("/quit", "/exit"):
                return 0
            if line and not self._command(line) and not self._answer(line) and not self._interactive:
                return 1

    def _command(self, line: str) -> bool:
        """Whether the line was a command."""
        name, _, argument = line.partition(" ")
        if name == "/new":
            self._client.messages, self._images = [], []
        elif name == "/image":
            image = Path(argument.strip().strip("'\"")).expanduser()
            if image.is_file():
                self._images.append(image)
                if self._interactive:
                    print(f"{image.name} goes with the next question.")
            else:
                print(f"{image} is no file.", file=sys.stderr)
        elif name == "/help":
            print(_HELP)
        else:
            return False
        return True

    def _answer(self, question: str) -> bool:
        try:
            for piece in self._client.ask(question, self._images):
                print(printable(piece), end="", flush=True)
        except ChatError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
            return False
        except KeyboardInterrupt:
            print("\n(stopped; the question is not part of the conversation)")
            return True
        self._images = []
        print(flush=True)
        return True


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code: 0, or 1 if a question that was piped in had no answer."""
    parser = argparse.ArgumentParser(
        prog,
        description=f"{__doc__}\n{_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("server", metavar="HOST:PORT", help="where the server listens")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="for the first question"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of an answer at most [the server's]")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy decoding [0]")
    parser.add_argument("--top-p", type=float, metavar="X", help="sample from the most likely tokens [1]")
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampled answers repeatable")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="its first line is the server's API key")
    options = parser.parse_args(argv)
    fields = {name: getattr(options, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    try:
        key = None
        if options.api_key_file:
            key = options.api_key_file.read_text(encoding="utf-8").strip().partition("\n")[0]
        client = ChatClient(options.server, key, **{name: value for name, value in fields.items() if value is not None})
    except (ChatError, OSError, UnicodeError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    return _Terminal(client, list(options.image)).run()
