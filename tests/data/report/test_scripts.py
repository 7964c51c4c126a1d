"""Letters by script."""

from __future__ import annotations

import pytest

from megatron_vlm.data.processing.conversation import Turn
from megatron_vlm.data.report.scripts import ScriptCounts, count_scripts


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("<image>\nWhat is 3 x 4?", {"Latin": 7}),
        ("schön, façade", {"Latin": 11}),
        ("ＡＢｃ", {"Latin": 3}),
        ("日本語のテスト", {"Han (Chinese, Japanese)": 3, "Kana (Japanese)": 4}),
        ("ﾃｽﾄ", {"Kana (Japanese)": 3}),
        ("한국어", {"Hangul (Korean)": 3}),
        ("Привет мир", {"Cyrillic": 9}),
        ("مرحبا", {"Arabic": 5}),
        ("ᏣᎳᎩ", {"other": 3}),
        ("1 + 1 = 2 🙂 \ud800\0", {}),
    ],
)
def test_letters_have_a_script(text: str, letters: dict[str, int]) -> None:
    assert count_scripts([Turn("human", text)]) == letters
    assert count_scripts([Turn("human", text), Turn("gpt", text)]) == {name: 2 * n for name, n in letters.items()}


def test_counts_of_samples() -> None:
    counts, other = ScriptCounts(), ScriptCounts()
    for text in ("abc мир!", "abcd мир", "12"):
        counts.add(count_scripts([Turn("gpt", text)]))
    other.add(count_scripts([Turn("gpt", "мир мир ab")]))
    counts.merge(other)
    assert counts.letters == {"Latin": 9, "Cyrillic": 12}
    assert counts.samples == {"Latin": 2, "Cyrillic": 1} and counts.without_letters == 1
