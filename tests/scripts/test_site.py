"""The site of the documents: every page is in it, every link leads somewhere, and it builds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "vm-test/README.md")
"""Documents outside of docs/ that are pages, too (scripts/site_hooks.py)."""
PAGES = sorted([*TOP, *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))])
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))


def anchors(page: str) -> set[str]:
    """The anchors of its headings, as GitHub and mkdocs make them: those that both make."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        found.add(re.sub(r" ", "-", re.sub(r"[^\w\- ]", "", words).strip()))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert there.exists(), f"{page}: {target}"
        if anchor:
            name = there.relative_to(ROOT).as_posix()
            assert anchor in anchors(name), f"{page}: {target}: {name} has no such heading"


def test_every_page_is_in_the_navigation() -> None:
    """Once, and nothing else is."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    named = re.findall(r": ([\w/.-]+\.md)$", nav, re.MULTILINE)
    assert len(named) == len(set(named))
    generated = {name for name in named if name.startswith("project/")}
    assert {f"docs/{name}" for name in named if name not in generated} == set(PAGES) - set(TOP)
    hooks = (ROOT / "scripts/site_hooks.py").read_text(encoding="utf-8")
    assert dict(re.findall(r'"([\w/-]+\.md)": "(project/[\w-]+\.md)"', hooks)).keys() == set(TOP)
    assert set(re.findall(r'"(project/[\w-]+\.md)"', hooks)) == generated


def test_pictures_are_small_and_stand_alone() -> None:
    """Well-formed, with a title, legible on dark pages, and nothing fetched from elsewhere."""
    pictures = sorted((ROOT / "docs/pictures").glob("*.svg"))
    assert len(pictures) >= 3
    for picture in pictures:
        text = picture.read_text(encoding="utf-8")
        assert ElementTree.fromstring(text).find("{http://www.w3.org/2000/svg}title") is not None
        assert "prefers-color-scheme: dark" in text
        assert text.count("://") == 1, "only the name of SVG itself"
        assert len(text) < 10_000


class Fetched(HTMLParser):
    """What a browser fetches by itself for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"script": "src", "img": "src", "iframe": "src", "link": "href"}
        value = dict(attrs).get(names.get(tag, ""))
        if value and not (tag == "link" and dict(attrs).get("rel") == "canonical"):
            self.found.append(value)


def mkdocs() -> str | None:
    """The program: of this environment, of the path, or what MKDOCS names."""
    beside = Path(sys.executable).with_name("mkdocs")
    return os.environ.get("MKDOCS") or (str(beside) if beside.exists() else shutil.which("mkdocs"))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    program = mkdocs()
    if program is None:
        pytest.skip("no mkdocs: pip install -e .[docs]")
    done = subprocess.run(
        [program, "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        away = [url for url in parser.found if "//" in url]
        assert not away, f"{page.name}: {away}"


def test_dependencies_are_told_with_their_reasons() -> None:
    """Each package of pyproject.toml has a row, with a license, and nothing else has one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    tables = {
        "To run": project["dependencies"],
        "To send spans": project["optional-dependencies"]["telemetry"],
        "To test": project["optional-dependencies"]["test"],
        "To develop, to measure, and for this site": [
            *project["optional-dependencies"]["dev"],
            *project["optional-dependencies"]["docs"],
            *project["optional-dependencies"]["bench"],
        ],
    }
    for heading, wanted in tables.items():
        part = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        rows = [
            [cell.strip() for cell in row.strip("|").split("|")]
            for row in re.findall(r"^\|.*\|$", part, re.M)
        ]
        told = {row[0].strip("`") for row in rows[2:]}
        names = {re.match(r"[\w.-]+", name)[0] for name in wanted} - {"glidefs"}  # type: ignore[index]
        assert told == names, heading
        assert all(all(row) for row in rows[2:]), f"{heading}: an empty cell"
