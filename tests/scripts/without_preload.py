"""A pytest plugin for sanitizer runs: programs that tests start must not inherit the preloaded sanitizer.

qemu's coroutines hang under it. For `pytest -p tests.scripts.without_preload`. Where tests run side by side,
the processes that run them do inherit it.
"""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Called before the first test, also in each of several processes."""
    if not config.getoption("numprocesses", None):
        os.environ.pop("LD_PRELOAD", None)
