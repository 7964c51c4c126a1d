"""The demo's progress bar: share done and time left, on a machine of any speed, after an interruption, too."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from progress import Estimate, ProgressBar, minutes


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()


def test_time_left_follows_the_speed_of_this_machine(clock: Clock) -> None:
    estimate = Estimate([100.0, 300.0], clock)
    assert estimate.seconds_left == 400  # nothing is known yet: the measured machine
    clock.seconds = 300
    estimate.finish()  # three times as slow
    assert estimate.percent == 25
    assert estimate.seconds_left == pytest.approx(300 * (300 + 20) / (100 + 20))
    estimate.read("iteration 150/300 | lm loss 0.1 | ...")
    assert estimate.percent == pytest.approx(62.5)
    assert estimate.elapsed == 300
    clock.seconds = 1200
    estimate.finish()
    assert (estimate.percent, estimate.seconds_left) == (100, 0)


def test_what_earlier_runs_did_says_nothing_about_the_speed(clock: Clock) -> None:
    estimate = Estimate([1000.0, 100.0], clock)
    estimate.skip()
    estimate.resume(0.5)
    clock.seconds = 100
    estimate.read("iteration  75/100 | ...")
    assert estimate.percent == pytest.approx(100 * 1075 / 1100)
    assert estimate.seconds_left == pytest.approx(25 * (100 + 20) / (25 + 20))


def test_the_time_left_does_not_grow_while_nothing_is_seen(clock: Clock) -> None:
    """Training prints an iteration once in a while: a slow beginning is not a slow machine."""
    estimate = Estimate([100.0, 900.0], clock)
    clock.seconds = 100
    estimate.finish()
    before = estimate.seconds_left
    clock.seconds = 400
    assert estimate.seconds_left == before == 900


def test_other_lines_say_nothing() -> None:
    estimate = Estimate([1.0])
    estimate.read("resuming after iteration 40 from runs/demo")
    estimate.read("saved iter_0000040")
    assert estimate.share == 0


def test_lines_are_printed_and_the_bar_is_below_them_on_a_terminal(clock: Clock) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for output, shows_bar in ((Terminal(), True), (io.StringIO(), False)):
        bar = ProgressBar(Estimate([62.0], clock), output)
        bar.print("iteration 31/62 | lm loss 0.1")
        bar.close()
        assert "iteration 31/62 | lm loss 0.1\n" in output.getvalue()
        assert ("[###############...............]  50 %   0:00 gone, about 0:" in output.getvalue()) == shows_bar


def test_minutes() -> None:
    assert [minutes(seconds) for seconds in (0, 59.9, 62, 3600)] == ["0:00", "0:59", "1:02", "60:00"]
