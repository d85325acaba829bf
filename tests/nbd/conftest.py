"""Fixtures of the NBD tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_fakes import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.server.start()
    yield made
    made.close()
