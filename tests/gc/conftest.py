"""Fixtures of the gc tests."""

from __future__ import annotations

import pytest
from gc_rig import ClockStore


@pytest.fixture
def store() -> ClockStore:
    return ClockStore()
