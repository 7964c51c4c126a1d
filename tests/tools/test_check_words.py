"""The word list: a planted word is found where it stands, ordinary English and public names are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.check_words import ROOT, check_text, read_words, text_files

WORDS, SKIP = read_words(ROOT / "tools" / "words.toml")


def found(text: str) -> list[str]:
    return [finding.text for finding in check_text(text, WORDS)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("if rank.speaks:", ["speaks"]),
        ('say("done")', ["say("]),
        ("_say(summary)", ["_say("]),
        ("def test_bad_input_is_told() -> None:", ["told"]),
        ("def where() -> Place:", ["Place"]),
        ("for place, cell in enumerate(row):", ["place"]),
        ("places of entries", ["places"]),
        ("A run goes on.", ["goes on"]),
        ("go_on = True", ["go_on"]),
        ("weights that were drawn", ["drawn"]),
        ("the sum over loss tokens", ["loss tokens"]),
        ("Labelled tokens", ["Labelled"]),
        ("image_positions = 3", ["image_positions"]),
        ("def layout() -> RowLayout:", ["RowLayout"]),
        ("with new_folder(save) as making:", ["making", "as making"]),
        ("cut after an answer", ["cut"]),
        ("f'{100 * plan.fill:.1f} %'", ["plan.fill"]),
        ("3 samples refused", ["refused"]),
        ("norm was 2.31 for 3.06", ["2.31 for 3.06"]),
        ("class Leaf:", ["Leaf"]),
    ],
)
def test_planted_words_are_found(text: str, expected: list[str]) -> None:
    assert sorted(found(text)) == sorted(expected)


@pytest.mark.parametrize(
    "text",
    [
        "what a user might say",
        "file.tell()",
        "they can be told apart",
        "text.replace(a, b)",
        "a placeholder, changed in place",
        "our norm takes its place",
        "three decimal places",
        'metrics["loss_tokens"], metrics["pack_fill"]',
        "train.refused.jsonl",
        "connection refused",
        'choices=("error", "skip", "cut")',
        "oversized_samples: cut",
        "pixels are filled with black",
        "leaf = tensor.detach()",
        "before making the folder",
        "a recommended setting",
        "a list of Counter.most_common",
    ],
)
def test_ordinary_english_and_public_names_are_not(text: str) -> None:
    assert found(text) == []


def test_a_phrase_is_found_over_line_breaks_and_split_strings() -> None:
    assert len(found("# a sum over loss\n# tokens")) == len(found('"a sum over loss "\n    f"tokens"')) == 1


def test_lines_are_counted_from_one() -> None:
    assert [(finding.file, finding.line) for finding in check_text("one\n\nanew\n", WORDS, "a.md")] == [("a.md", 3)]


def test_only_tracked_text_under_the_paths() -> None:
    names = text_files([str(ROOT / "tools")], SKIP)
    assert "tools/check_words.py" in names and "tools/words.toml" not in names
    assert all(name.startswith("tools/") for name in names)
    assert "Makefile" in text_files([str(ROOT)], SKIP)


def test_the_command_names_file_line_word_and_replacement(tmp_path: Path) -> None:
    """In a repository of its own, because what it reports in this one changes."""
    (tmp_path / "tools").mkdir()
    for name in ("check_words.py", "words.toml"):
        (tmp_path / "tools" / name).write_bytes((ROOT / "tools" / name).read_bytes())
    (tmp_path / "notes.md").write_text("fine\nread it anew\n")
    (tmp_path / "untracked.md").write_text("anew\n")
    command = [sys.executable, "tools/check_words.py"]
    without_git = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert without_git.stdout == "notes.md:2: anew  ->  again\nuntracked.md:1: anew  ->  again\n"
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "notes.md", "tools"], cwd=tmp_path, check=True)
    report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert report.returncode == 1 and report.stdout == "notes.md:2: anew  ->  again\n"
    assert subprocess.run([*command, "tools"], cwd=tmp_path, capture_output=True).returncode == 0
