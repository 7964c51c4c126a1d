"""What a conversion refuses, said once and clearly."""

from __future__ import annotations

import sys
from collections.abc import Callable

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
    """Run a command's body; a refusal becomes one message on stderr and exit code 1."""
    try:
        command()
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
