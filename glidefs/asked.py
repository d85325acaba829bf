"""Who asked for the work that a thread does: for the log, and to end waits whose client is gone.

It goes with the thread (a context variable), so calls deep below a verb need no argument for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from glidefs.errors import Abandoned


class Asker:
    """``who`` in words: "uid 0 pid 812", an address, "start", "daemon". ``gone`` is set once it has left."""

    __slots__ = ("gone", "who")

    def __init__(self, who: str) -> None:
        self.who = who
        self.gone = threading.Event()


DAEMON = Asker("daemon")
START = Asker("start")
_asker: ContextVar[Asker] = ContextVar("asker", default=DAEMON)


def asker() -> Asker:
    """Who asked for what this thread does."""
    return _asker.get()


@contextmanager
def asked_by(who: Asker) -> Iterator[None]:
    """The block's work is done for ``who``."""
    token = _asker.set(who)
    try:
        yield
    finally:
        _asker.reset(token)


def check_listening(what: str) -> None:
    """Raises Abandoned if who asked for ``what`` has gone."""
    if asker().gone.is_set():
        raise Abandoned(f"{what} was given up because its client went away; ask again")
