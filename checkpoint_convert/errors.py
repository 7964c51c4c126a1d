"""The error of a conversion, and how a command ends with it: one message and an exit code."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SHOWN = 8


class ConversionError(Exception):
    """A checkpoint, config or tokenizer cannot be converted; the message says what is wrong, where, and what to do."""


def some_of(names: list[str]) -> str:
    """The first few names of a list, one per line, and the number of the others."""
    lines = [f"  {name}" for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        lines.append(f"  ... and {len(names) - _SHOWN} more")
    return "\n".join(lines)


def run_command(command: Callable[[], None]) -> int:
    """Run the body of a command; returns the exit code.

    A ConversionError, or an OSError such as a full disk, is printed as one message and returns 1. Ctrl-C returns 130
    and SIGTERM exits with 143, both after the body's cleanup.
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
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Inside the block, SIGTERM raises SystemExit so that `finally` blocks run; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _exit(number: int, _: object) -> None:
    sys.exit(128 + number)
