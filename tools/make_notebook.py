"""Make the notebook of a tutorial from its page, so that both say the same.

python tools/make_notebook.py docs/own-data.md examples/own_data.ipynb

Blocks marked `sh` become cells that run. A `python` block is the file that the paragraph before it names last; its cell
writes that file. All else becomes text.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"`([\w.-]+\.py)`")
_LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")


@dataclass(frozen=True)
class Cell:
    """A part of the page."""

    kind: str
    """text, sh or python"""
    source: str
    file: str = ""
    """Of a python block."""


def read_page(text: str) -> list[Cell]:
    """The parts of a page in order. Raises ValueError if a python block has no file name before it."""
    cells, end = [], 0
    for block in _BLOCK.finditer(text):
        before = text[end : block.start()].strip()
        if before:
            cells.append(Cell("text", before))
        names = _FILE.findall(before)
        if block[1] == "python" and not names:
            raise ValueError(f"no file is named before this block:\n{block[0]}")
        cells.append(Cell(block[1], block[2].rstrip("\n"), names[-1] if block[1] == "python" else ""))
        end = block.end()
    if rest := text[end:].strip():
        cells.append(Cell("text", rest))
    return cells


def notebook(cells: list[Cell], folder: str) -> dict[str, Any]:
    """The notebook's content. `folder` is the page's, seen from the notebook's."""
    made = []
    for number, cell in enumerate(cells):
        common: dict[str, Any] = {"id": f"part-{number}", "metadata": {}}
        if cell.kind == "text":
            source = _LINK.sub(rf"]({folder}/\1)", cell.source)
            made.append({"cell_type": "markdown", **common, "source": _lines(source)})
            continue
        heading = "%%bash\nset -e" if cell.kind == "sh" else f"%%writefile {cell.file}"
        lines = _lines(f"{heading}\n{cell.source}")
        made.append({"cell_type": "code", **common, "execution_count": None, "outputs": [], "source": lines})
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def notebook_text(page: Path, folder: str) -> str:
    """The notebook of a page as JSON text."""
    return (
        json.dumps(notebook(read_page(page.read_text(encoding="utf-8")), folder), indent=1, ensure_ascii=False) + "\n"
    )


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, metavar="PAGE.md")
    parser.add_argument("notebook", type=Path, metavar="NOTEBOOK.ipynb", help="in a folder beside the page's")
    options = parser.parse_args()
    text = notebook_text(options.page, f"../{options.page.parent.name}")
    options.notebook.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
