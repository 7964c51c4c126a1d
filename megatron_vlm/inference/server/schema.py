"""What the requests of all protocols have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ConfigDict

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""No conversions, no unknown fields: a mistake is an error, not another answer."""


def _valid_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text has half of a surrogate pair, which is no character") from error
    return text


def _zero(value: float) -> float:
    if value:
        raise ValueError("this is not supported: leave it out")
    return value


Text = Annotated[str, AfterValidator(_valid_unicode)]
Zero = Annotated[float, AfterValidator(_zero)]
"""A field that clients send, but whose effect this server does not have."""
