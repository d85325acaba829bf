"""Daemons for tests; see daemon_harness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_harness import Daemon


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Make daemons, all on one store unless told otherwise; those left running are ended."""
    made: list[Daemon] = []

    def make(name: str = "a", extra: str = "", node: str = "node-1", store: Path | None = None) -> Daemon:
        daemon = Daemon(tmp_path / name, store or tmp_path / "store", extra, node)
        made.append(daemon)
        return daemon

    yield make
    for daemon in made:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    """A running daemon."""
    return make_daemon().start()
