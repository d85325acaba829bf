"""Hooks of mkdocs: documents beside docs/ are pages of the site too, and links lead where they do here.

A link to a page of the site becomes one within the site; one to another file of the tree becomes its name, as
a site has no sources.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "project/readme.md",
    "ARCHITECTURE.md": "project/architecture.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "vm-test/README.md": "project/vm-test.md",
}
"""From the path in the tree to that in the site."""
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<!!)\[([^\]\n]*(?:\n[^\]\n]*)?)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the documents that are not in docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page; code stays as it is."""
    here = page.file.src_uri
    parts = FENCE.split(markdown)
    return "".join(
        part if n % 2 else LINK.sub(lambda m: _turned(m, here), part) for n, part in enumerate(parts)
    )


def _turned(match: re.Match[str], here: str) -> str:
    text, target = match[1], match[2]
    path, mark, anchor = target.partition("#")
    if "://" in target or not path:
        return match[0]
    there = posixpath.normpath(posixpath.join(posixpath.dirname(SOURCES.get(here, f"docs/{here}")), path))
    page = PAGES.get(there) or (there.removeprefix("docs/") if there.startswith("docs/") else "")
    if not page:
        return text
    return f"[{text}]({posixpath.relpath(page, posixpath.dirname(here) or '.')}{mark}{anchor})"
