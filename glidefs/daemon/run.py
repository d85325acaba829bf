"""`glidefs run`: the life of the process. TERM and INT stop it, a second one hurries; HUP hands over."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from typing import NoReturn

from glidefs.asked import Asker, asked_by
from glidefs.config import load_config
from glidefs.daemon import io_flusher, process
from glidefs.daemon.daemon import Daemon
from glidefs.daemon.log_lines import setup_logging
from glidefs.errors import GlideError
from glidefs.handoff.successor import Aborted, Successor, is_successor
from glidefs.places import config_path
from glidefs.version import version

log = logging.getLogger(__name__)


class Signals:
    """What the process was asked for. ``wake`` is set by each, and by whoever wants to be looked at."""

    def __init__(self) -> None:
        self.stop, self.hurry, self.hang_up = threading.Event(), threading.Event(), threading.Event()
        self.wake = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_hang_up)

    def _on_stop(self, number: int, frame: object) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()
        self.wake.set()

    def _on_hang_up(self, number: int, frame: object) -> None:
        self.hang_up.set()
        self.wake.set()


def run_daemon(config_file: str | None, *, init_store: bool = False) -> NoReturn:
    """The whole life of the process. Raises GlideError if it cannot start.

    ``init_store``: make the directory of a ``file://`` store that is not there.
    """
    refused = io_flusher.become_io_flusher()  # first: every thread from here on inherits it
    path = config_path(config_file)
    config = load_config(path)
    setup_logging(config.daemon.log_level, config.daemon.log_format)
    signals = Signals()
    daemon = Daemon(config, str(path.absolute()), signals.stop, init_store=init_store)
    daemon.on_handed_over = signals.wake.set
    try:
        if is_successor():
            _take_over(daemon)
        else:
            daemon.start()
    except Aborted as reason:
        log.info("not taking over: %s", reason)
        daemon.leave()
    if refused is not None:
        log.info(
            "not an I/O flusher (%s): when memory is short the daemon may wait for its own devices; %s",
            refused,
            io_flusher.REMEDY,
        )
    # A successor says that it is the main process now: its predecessor may die before it says so.
    serving = f"STATUS=serving {len(daemon.router.table.all())} exports"
    process.notify("READY=1", f"MAINPID={os.getpid()}", serving)
    while not signals.stop.is_set():
        signals.wake.wait()
        signals.wake.clear()
        if signals.hang_up.is_set():
            signals.hang_up.clear()
            _hand_over(daemon)
        if daemon.handed_over.is_set():
            daemon.leave()
    daemon.stop(signals.hurry)
    process.end(0)


def _take_over(daemon: Daemon) -> None:
    """Raises what ends this process, which then leaves nothing behind."""
    try:
        Successor(daemon, daemon.config.cache.dir, f"glidefs {version()}").run()
    except BaseException:
        daemon.discard_listeners()
        raise


def _hand_over(daemon: Daemon) -> None:
    with asked_by(Asker("SIGHUP")), contextlib.suppress(GlideError):  # which the log says
        daemon.hand_over()
