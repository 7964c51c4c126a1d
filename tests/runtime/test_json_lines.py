"""JSON Lines of runs that were killed at any moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlm.runtime.json_lines import keep_lines, read_lines

WHOLE = '{"n": 1, "loss": 0.1}\n{"n": 2, "loss": NaN}\n'


@pytest.mark.parametrize("end", ["", '{"n": 3', '{"n": 3, "loss": 0.3', "\n"])
def test_an_unfinished_line_is_ignored(tmp_path: Path, end: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(WHOLE + end)
    assert [entry["n"] for entry in read_lines(path)] == [1, 2]
    keep_lines(path, lambda entry: entry["n"] <= 2)
    assert path.read_text() == WHOLE
    keep_lines(path, lambda entry: entry["n"] < 2)
    assert path.read_text() == WHOLE.splitlines(keepends=True)[0]


def test_killed_while_lines_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(WHOLE)
    killed = KeyboardInterrupt()

    def wanted(entry: dict[str, object]) -> bool:
        if entry["n"] == 2:
            raise killed
        return False

    with pytest.raises(KeyboardInterrupt):
        keep_lines(path, wanted)
    assert path.read_text() == WHOLE
