"""Hooks of mkdocs: files outside docs/ become pages, and relative links between files become links between pages.

A link such as `../tests/README.md` works on GitHub as it is; in the site it must name the page that the file becomes.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from mkdocs.structure.files import File

PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "tests/README.md": "tests.md"}
"""File, relative to the root of the repository -> page of the site."""
REPOSITORY_ONLY = ("LICENSE", "CONTRIBUTING.md")
"""Files that a page links to and that are no pages: in the site, the text stands without a link."""

_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, *, config: Any, **_: Any) -> Any:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=source))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Rewrite each relative link of a page; links to other pages of docs/ stay as they are."""
    names = {name: file for file, name in PAGES.items()}
    here = names.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
        if target in REPOSITORY_ONLY:
            return text
        return f"[{text}]({PAGES.get(target, target.removeprefix('docs/'))}{anchor or ''})"

    return _LINK.sub(rewrite, markdown)
