"""The message of a problem with a setting, and arithmetic for its remedies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """A setting, its value, what is wrong with it, and what to do about it."""

    setting: str
    value: Any
    wrong: str
    remedy: str

    def __str__(self) -> str:
        value = "nothing" if self.value in (None, "", []) else self.value
        return f"{self.setting} = {value}: {self.wrong}. {self.remedy}."


def divides(divisor: int, number: int) -> bool:
    """Whether `divisor` divides `number`. True if either is below 1, which check_values reports."""
    return divisor < 1 or number < 1 or number % divisor == 0


def multiples_around(number: int, divisor: int) -> str:
    """The multiples of `divisor` nearest to `number`, as text: "4096 or 4104"."""
    below = number // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


def divisors(number: int, at_most: int) -> str:
    """All divisors of `number` up to `at_most`, as text: "1, 2 or 4"."""
    found = [str(d) for d in range(1, min(number, at_most) + 1) if number % d == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
