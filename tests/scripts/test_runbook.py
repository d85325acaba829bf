"""docs/runbook.md quotes what the program says: each quote must be in the code."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from glidefs.cli.template import TEMPLATE

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
QUOTES = sorted(set(re.findall(r'`"([^`]+)"`', RUNBOOK)))


@cache
def sources() -> str:
    """The code with literals that are only split over lines joined, and placeholders as a common sign."""
    paths = [*(ROOT / "glidefs").rglob("*.py"), *(ROOT / "csrc").rglob("*.c")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    text = re.sub(r'"\s*\n\s*f?"', "", text)
    return re.sub(r"%(?:ll|016ll)?[a-z]|\{[^{}\"]*\}", "…", text)


def test_there_are_quotes() -> None:
    assert len(QUOTES) > 50


@pytest.mark.parametrize("quote", QUOTES)
def test_quotes_are_in_the_code(quote: str) -> None:
    pieces = [re.escape(piece.strip(" ;:,")) for piece in quote.split("…")]
    assert re.search(r"[^\n]{0,300}?".join(pieces), sources())


def test_settings_exist() -> None:
    sections: dict[str, set[str]] = {}
    section = ""
    for line in TEMPLATE.splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
        elif match := re.match(r"#?(\w+) = ", line):
            sections.setdefault(section, set()).add(match[1])
    named = re.findall(r"`\[(\w+)\] (\w+)", RUNBOOK)
    assert len(named) > 8
    for where, key in named:
        assert key in sections[where], f"[{where}] {key}"


def test_anchors_exist() -> None:
    headings = re.findall(r"^#+ (.+)$", RUNBOOK, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(#([^)]+)\)", RUNBOOK):
        assert target in anchors, target


def test_states_and_units_are_named_as_they_are() -> None:
    unit = (ROOT / "packaging" / "glidefs.service").read_text(encoding="utf-8")
    for setting in re.findall(r"`((?:Restart|OOMScoreAdjust)=[^`]+)`", RUNBOOK):
        assert setting in unit, setting
