"""The scripts of texts, Latin or Han or Cyrillic, by their letters.

A letter has one script, so the counts are exact. Languages would be guesses: the usual identifiers need a sentence or
two, and questions and answers are often a few words.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER, Turn

OTHER = "other"
_SCRIPTS = {
    "LATIN": "Latin", "CJK": "Han (Chinese, Japanese)", "HIRAGANA": "Kana (Japanese)", "KATAKANA": "Kana (Japanese)",
    "HANGUL": "Hangul (Korean)", "CYRILLIC": "Cyrillic", "ARABIC": "Arabic", "DEVANAGARI": "Devanagari (Hindi)",
    "BENGALI": "Bengali", "TAMIL": "Tamil", "TELUGU": "Telugu", "GUJARATI": "Gujarati", "GURMUKHI": "Gurmukhi",
    "KANNADA": "Kannada", "MALAYALAM": "Malayalam", "SINHALA": "Sinhala", "THAI": "Thai", "LAO": "Lao",
    "KHMER": "Khmer", "MYANMAR": "Burmese", "TIBETAN": "Tibetan", "HEBREW": "Hebrew", "GREEK": "Greek",
    "ARMENIAN": "Armenian", "GEORGIAN": "Georgian", "ETHIOPIC": "Ethiopic",
}  # fmt: skip
"""The first word of a letter's Unicode name -> its script, with a language where the script has few."""
_WIDTHS = ("FULLWIDTH ", "HALFWIDTH ")


@dataclass
class ScriptCounts:
    """The letters of a dataset's texts, questions and answers alike."""

    letters: Counter[str] = field(default_factory=Counter)
    """Script -> letters."""
    samples: Counter[str] = field(default_factory=Counter)
    """Script -> samples in which no script has more letters."""
    without_letters: int = 0
    """Samples of digits, signs and spaces alone."""

    def add(self, letters: Counter[str]) -> None:
        """Count a sample with these letters by script."""
        self.letters += letters
        if letters:
            self.samples[letters.most_common(1)[0][0]] += 1
        else:
            self.without_letters += 1

    def merge(self, other: ScriptCounts) -> None:
        """Add the counts of another dataset."""
        self.letters += other.letters
        self.samples += other.samples
        self.without_letters += other.without_letters


def count_scripts(turns: list[Turn]) -> Counter[str]:
    """Script -> letters of a conversation."""
    characters = Counter("".join(turn.text for turn in turns).replace(IMAGE_PLACEHOLDER, ""))
    found: Counter[str] = Counter()
    for character, count in characters.items():
        script = _script(character)
        if script is not None:
            found[script] += count
    return found


@cache
def _script(character: str) -> str | None:
    """The script of a letter; None for any other character."""
    if not unicodedata.category(character).startswith("L"):
        return None
    name = unicodedata.name(character, "")
    for width in _WIDTHS:
        name = name.removeprefix(width)
    return _SCRIPTS.get(name.split(" ")[0], OTHER)
