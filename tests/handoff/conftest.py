"""Fixtures of the tests of handoffs between real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from handoff_rig import Generations

SETTINGS = {
    "cache": {"log_size": '"256MiB"', "segment_size": '"1MiB"', "block_cache_size": '"32MiB"'},
    "upload": {"sync_interval": '"5s"'},
}


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[Callable[..., Generations]]:
    """Daemons, each with a store of its own; whatever of them is left at the end is killed."""
    made: list[Generations] = []

    def make(die: str = "", endpoint: str = "", stop_at: str = "", seconds: str = "") -> Generations:
        daemon = Generations(tmp_path / f"n{len(made)}", endpoint=endpoint, settings=SETTINGS)
        daemon.die, daemon.stop_at, daemon.seconds = die, stop_at, seconds
        made.append(daemon)
        return daemon

    yield make
    for daemon in made:
        daemon.kill_all()


@pytest.fixture
def daemon(make_daemon: Callable[..., Generations]) -> Generations:
    return make_daemon().start()
