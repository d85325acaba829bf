"""Measured figures of acceptance tests: printed in pytest's summary, and kept as JSON lines where
``GLIDEFS_FIGURES`` names a file. A figure with a limit fails its test when it is over (or under) it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_kept: list[str] = []


class Figures:
    """The figures of one test."""

    def __init__(self, test: str) -> None:
        self._test = test

    def __call__(
        self,
        name: str,
        value: float,
        unit: str = "",
        *,
        below: float | None = None,
        at_least: float | None = None,
    ) -> float:
        """Record a figure; with a limit, also check it."""
        limit = f" (limit: below {below:g})" if below is not None else ""
        limit += f" (limit: at least {at_least:g})" if at_least is not None else ""
        line = f"{self._test}: {name} = {value:.4g} {unit}".rstrip() + limit
        _kept.append(line)
        path = os.environ.get("GLIDEFS_FIGURES")
        if path:
            row: dict[str, Any] = {"test": self._test, "name": name, "value": value, "unit": unit}
            row |= {"below": below, "at_least": at_least, "kernel": os.uname().release}
            with Path(path).open("a") as file:
                file.write(json.dumps(row) + "\n")
        assert below is None or value < below, line
        assert at_least is None or value >= at_least, line
        return value


def summary(terminal: Any) -> None:
    """For ``pytest_terminal_summary``: print what was kept, once."""
    if _kept:
        terminal.write_sep("=", "figures")
        for line in _kept:
            terminal.write_line(line)
        _kept.clear()
