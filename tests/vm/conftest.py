"""Makes the helpers of this directory importable, however pytest was started, and prints figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "acceptance"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import figures


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> figures.Figures:
    return figures.Figures(request.node.name)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    figures.summary(terminalreporter)
