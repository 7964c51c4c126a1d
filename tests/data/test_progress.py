"""Lines in a log and a bar on a terminal show what the processes have done so far."""

from __future__ import annotations

import io
import logging
import sys
import time

import pytest

from megatron_vlm.data import progress
from megatron_vlm.data.worker_pool import parallel_map, report_progress


def work(number: int) -> int:
    """50 samples per call."""
    for done in range(50):
        report_progress(done + 1)
        time.sleep(0.002)
    return number


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.05)
    with caplog.at_level(logging.INFO):
        assert list(parallel_map(work, 4, 2, "working", 1, samples=300, samples_before=100)) == [0, 1, 2, 3]
    done = [int(message.split()[1]) for message in caplog.messages]
    # the first line may come before the first sample is done
    assert len(done) > 1 and done == sorted(done) and done[0] >= 100 and 100 < done[-1] <= 300
    assert all("of 300 samples" in message and "remaining" in message for message in caplog.messages)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bar_on_a_terminal(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_DELAY", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(parallel_map(work, 4, processes, "working", 1, samples=200))
    assert "working" in terminal.getvalue() and "200/200" in terminal.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(5.2, "5 s"), (65, "1 min 05 s"), (7260, "2 h 01 min")])
def test_durations(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text
