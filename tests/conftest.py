"""Makes the helpers that lie beside it importable by every test: pytest puts its directory on the path."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
OF_PROCESSES = {"acceptance", "daemon", "handoff", "mutations", "packaging"}
"""Directories of tests that start daemons or are as slow: the inner loop leaves them out."""
SMOKE = {
    "test_restart_serves_the_same_exports",
    "test_detach_and_attach_elsewhere",
    "test_the_life_of_a_base",
    "test_a_connection_is_not_reset",
}
"""Tests of them that it does."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        directory = item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else ""
        if directory in OF_PROCESSES and item.name not in SMOKE:
            item.add_marker("processes")
