"""A command ends with one message and an exit code."""

from __future__ import annotations

import signal

import pytest

from checkpoint_convert.errors import ConversionError, run_command


def _fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConversionError("the head is missing"), 1, "error: the head is missing"),
        (OSError(28, "No space left on device", "a/b"), 1, "error: a/b: No space left on device"),
        (KeyboardInterrupt(), 130, "error: interrupted; nothing was written"),
    ],
)
def test_one_message_and_a_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: _fail(error)) == code
    assert capsys.readouterr().err == message + "\n"


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    assert run_command(lambda: seen.append(signal.getsignal(signal.SIGTERM))) == 0
    assert run_command(lambda: _fail(ConversionError("no"))) == 1
    assert signal.getsignal(signal.SIGTERM) is before and seen[0] is not before
