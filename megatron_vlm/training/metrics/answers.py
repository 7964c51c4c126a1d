"""Answers that the model in training has generated, and how they are shown: an image beside what was asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

_IMAGE_SIDE = 320
_TEXT_WIDTH = 460
_MARGIN = 12
_FONT_SIZE = 15
_LINE_HEIGHT = 20
_MAX_LINES = 14
"""Of the question and of each answer."""
_FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf")
"""Taken where they are installed: Pillow's own font has ASCII letters only."""
_HEADING, _TEXT, _PAPER = (110, 110, 110), (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class Answer:
    """A held-out question, its answer in the data, and that of the model."""

    sample_id: str
    question: str
    """With its image placeholders."""
    answer: str
    """In the data."""
    generated: str
    images: Sequence[Image.Image]

    def as_line(self) -> dict[str, str]:
        """The fields of a line of generated_samples.jsonl."""
        return {
            "id": self.sample_id, "question": self.question, "answer": self.answer, "generated": self.generated
        }  # fmt: skip

    def as_markdown(self) -> str:
        """The texts, word for word: indented lines are not interpreted."""
        return "\n\n".join(
            f"**{heading}**\n\n" + "\n".join(f"    {line}" for line in text.splitlines() or [""])
            for heading, text in self._texts()
        )

    def panel(self) -> Image.Image:
        """The images on the left, one below the other; question, answer and generated answer on the right."""
        thumbnails = [_thumbnail(image) for image in self.images]
        left = _MARGIN + (_IMAGE_SIDE + _MARGIN if thumbnails else 0)
        font = _font()
        lines = [
            line
            for heading, text in self._texts()
            for line in [(heading, _HEADING), *((part, _TEXT) for part in _wrapped(text, font)), ("", _TEXT)]
        ]
        height = _MARGIN + max(
            len(lines) * _LINE_HEIGHT, sum(thumbnail.height + _MARGIN for thumbnail in thumbnails), _LINE_HEIGHT
        )
        panel = Image.new("RGB", (left + _TEXT_WIDTH + _MARGIN, height), _PAPER)
        top = _MARGIN
        for thumbnail in thumbnails:
            panel.paste(thumbnail, (_MARGIN, top))
            top += thumbnail.height + _MARGIN
        draw = ImageDraw.Draw(panel)
        for number, (line, colour) in enumerate(lines):
            draw.text((left, _MARGIN + number * _LINE_HEIGHT), line, colour, font)
        return panel

    def _texts(self) -> list[tuple[str, str]]:
        return [("Question", self.question), ("Answer in the data", self.answer), ("Generated", self.generated)]


@cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    for name in _FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, _FONT_SIZE)
    return ImageFont.load_default(_FONT_SIZE)


def _thumbnail(image: Image.Image) -> Image.Image:
    copy = image.copy()
    copy.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    return copy


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Lines that fit into the text's width; at most _MAX_LINES."""
    lines: list[str] = []
    for line in _wrap(text, font):
        if len(lines) == _MAX_LINES:
            lines[-1] = "…"
            break
        lines.append(line)
    return lines


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> Iterator[str]:
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= _TEXT_WIDTH:
                line = longer
                continue
            if line:
                yield line
            while font.getlength(word) > _TEXT_WIDTH:  # as a whole line of a language without spaces
                fitting = next(end for end in range(len(word), 0, -1) if font.getlength(word[:end]) <= _TEXT_WIDTH)
                yield word[:fitting]
                word = word[fitting:]
            line = word
        yield line
