"""What a conversion refuses, said once and clearly."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SHOWN = 8


class ConversionError(Exception):
    """A checkpoint, config or tokenizer that cannot be converted; the message says what, where and what to do."""


def some_of(names: list[str]) -> str:
    """The first few names of a long list, one to a line, and how many more there are."""
    lines = [f"  {name}" for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        lines.append(f"  ... and {len(names) - _SHOWN} more")
    return "\n".join(lines)


def run_command(command: Callable[[], None]) -> int:
    """Run a command's body; a rejection, or a disk that is full or cannot be read, becomes one message and exit code 1.

    An end by Ctrl-C or SIGTERM goes through the body's own cleaning up and is exit code 130 or 143.
    """
    try:
        with _sigterm_unwinds():
            command()
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was made", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """For the time of the block, SIGTERM ends the process by way of its `finally`s; in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _end(number: int, _: object) -> None:
    sys.exit(128 + number)
