"""Report words that this project no longer uses, with the field's words for them: tools/words.toml is the list.

python tools/check_words.py                     # all tracked text
python tools/check_words.py megatron_vlm/data   # these files and folders only
python tools/check_words.py --count docs        # how often each word is used, not where
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = ("*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.cff", "*.sh", "Makefile", "Dockerfile*", ".ci/*")
_MADE = {".venv", "runs", "build", "dist", "site"}

# What a space of a pattern matches: white space, and at a line's end also what a comment or a split string puts there.
_GAP = r"""(?:[ \t]*["']?\s+(?:(?:#|f?["'])\s*)?)"""


@dataclass(frozen=True)
class Word:
    """One entry of the list."""

    find: list[re.Pattern[str]]
    use: str
    allow: list[re.Pattern[str]]


@dataclass(frozen=True)
class Finding:
    """`text` at `line` (from 1) of `file`; `use` is what to write instead."""

    file: str
    line: int
    text: str
    use: str


def _alternatives(patterns: list[str]) -> list[re.Pattern[str]]:
    # Apart, because `re` looks for one literal beginning much faster than for several.
    # A match does not end inside a word; _matches sees to its beginning, for the same reason.
    end = r"(?:(?![A-Za-z])|(?<![A-Za-z]))"
    return [re.compile(f"(?:{pattern.replace(' ', _GAP)}){end}", re.IGNORECASE | re.MULTILINE) for pattern in patterns]


def _matches(patterns: list[re.Pattern[str]], text: str) -> Iterator[re.Match[str]]:
    """Matches that do not begin inside a word. "_" counts as a space between words: "one_word" has the word "word"."""
    for pattern in patterns:
        for match in pattern.finditer(text):
            start = match.start()
            if not (start and re.fullmatch("[A-Za-z]{2}", text[start - 1 : start + 1])):
                yield match


def read_words(path: Path) -> tuple[list[Word], list[str]]:
    """The entries of the list, and patterns of files to skip.

    Raises:
        re.error: a regular expression of the list is wrong.
    """
    table = tomllib.loads(path.read_text())
    words = [
        Word(_alternatives(entry["find"]), entry["use"], _alternatives(entry.get("allow", [])))
        for entry in table["word"]
    ]
    return words, table["skip"]


def check_text(text: str, words: list[Word], file: str = "text") -> Iterator[Finding]:
    """Uses of `words` in `text`, except inside a match of their `allow`."""
    for word in words:
        matches = list(_matches(word.find, text))
        allowed = [match.span() for match in _matches(word.allow, text)] if matches else []
        for match in matches:
            start, end = match.span()
            if not any(first <= start and end <= last for first, last in allowed):
                yield Finding(file, text.count("\n", 0, start) + 1, " ".join(match.group().split()), word.use)


def text_files(paths: list[str], skip: list[str]) -> list[str]:
    """Text files under `paths`, relative to the root: those that git tracks, or all where this is not a repository."""
    inside = [str(Path(path).resolve().relative_to(ROOT)) for path in paths]
    if (ROOT / ".git").exists():
        # -z: names with other than ASCII characters stay as they are
        listed = subprocess.run(["git", "ls-files", "-z", "--", *inside], cwd=ROOT, capture_output=True, check=True)
        names = [name for name in listed.stdout.decode().split("\0") if name]
    else:
        names = [str(file.relative_to(ROOT)) for path in inside for file in sorted(_files(ROOT / path))]

    def matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(Path(name).name, pattern) for pattern in patterns)

    return [name for name in names if matches(name, TEXT) and not matches(name, skip) and (ROOT / name).is_file()]


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if not _MADE & {*file.parts}]


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if no word was found, 1 if some were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=[str(ROOT)], metavar="PATH", help="default: the whole repository")
    parser.add_argument("--count", action="store_true", help="how often each word is used, not where")
    options = parser.parse_args(argv)
    words, skip = read_words(ROOT / "tools" / "words.toml")
    found = [
        finding
        for name in text_files(options.paths, skip)
        for finding in sorted(check_text((ROOT / name).read_text(), words, name), key=lambda finding: finding.line)
    ]
    if options.count:
        for (text, use), count in Counter((finding.text.lower(), finding.use) for finding in found).most_common():
            print(f"{count:5d}  {text}  ->  {use}")
    else:
        for finding in found:
            print(f"{finding.file}:{finding.line}: {finding.text}  ->  {finding.use}")
    if found:
        print(f"{len(found)} words to replace; the list is tools/words.toml", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
