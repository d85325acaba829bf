"""Makes the helpers that lie beside it importable by every test: pytest puts its directory on the path."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
OUTER = {"acceptance", "daemon", "handoff", "mutations", "packaging", "sim"}
"""Directories of tests that start daemons or are as slow: the inner loop leaves them out."""
OUTER_TESTS = {line for line in (HERE / "outer_tests.txt").read_text().splitlines() if line[:1] != "#"}
SMOKE = {
    "test_restart_serves_the_same_exports",
    "test_detach_and_attach_elsewhere",
    "test_a_connection_is_not_reset",
}
"""Tests of those directories that it has."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        directory = item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else ""
        name = item.name.partition("[")[0]
        if name in OUTER_TESTS or (directory in OUTER and name not in SMOKE):
            item.add_marker("outer")
