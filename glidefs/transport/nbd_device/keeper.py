"""A thread that looks at devices a moment after something happened to them, and again until all is well."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

FIRST_LOOK = 0.1
"""Seconds. A device that comes with a handoff has its connection by then."""
LAST_LOOK = 5.0


class Keeper:
    """Calls ``look(name)`` until it returns True. ``_changed`` guards the plan."""

    def __init__(self, look: Callable[[str], bool]) -> None:
        self._look = look
        self._changed = threading.Condition()
        self._due: dict[str, float] = {}
        self._pause: dict[str, float] = {}
        self._stopping = False
        self._thread: threading.Thread | None = None

    def look_at(self, name: str) -> None:
        """Look soon; later, if it was looked at in vain just now."""
        with self._changed:
            if self._stopping:
                return
            at = time.monotonic() + self._pause.get(name, FIRST_LOOK)
            self._due[name] = min(at, self._due.get(name, at))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="nbd-devices", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Stop and join the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                name = self._next()
                if name is None:
                    return
            try:
                well = self._look(name)
            except Exception:
                log.exception("%s: its device could not be looked at", name)
                well = False
            with self._changed:
                if well:
                    self._pause.pop(name, None)
                    continue
                self._pause[name] = min(2 * self._pause.get(name, FIRST_LOOK / 2), LAST_LOOK)
                self._due.setdefault(name, time.monotonic() + self._pause[name])

    def _next(self) -> str | None:
        """Wait for what is due; None: stop."""
        while not self._stopping:
            now = time.monotonic()
            due = min(self._due, key=self._due.__getitem__, default=None)
            if due is not None and self._due[due] <= now:
                del self._due[due]
                return due
            self._changed.wait(None if due is None else self._due[due] - now)
        return None
