"""The state of the store: whether it answers, who waits for it, and for how long.

A wait is of what is asked, not of a call: callers with a deadline of seconds ask again and again, and
each of their calls alone would never have waited for long. So waits are kept by lane, operation and
key, from the first failure to the first answer, and forgotten when nobody asks any more.
"""

from __future__ import annotations

import logging
import threading
import time

import msgspec

log = logging.getLogger(__name__)

LOUD_AFTER = 10.0
"""Seconds that something waits before it is a line in the log."""
FORGOTTEN_AFTER = 60.0
"""Seconds after which what nobody asks for any more is no wait."""

Waiting = tuple[str, str, str]
"""Lane, operation, and key (or the place of keys that are new for each try)."""


class StoreState(msgspec.Struct, frozen=True):
    """``away`` since ``since`` (unix seconds) for ``reason``, or not away, 0 and empty.

    ``longest_wait``: seconds that the request waits which has waited longest, 0 where none does;
    ``wait_reason`` is why. A store that is not away may keep some requests waiting.
    """

    away: bool = False
    since: float = 0.0
    reason: str = ""
    longest_wait: float = 0.0
    wait_reason: str = ""


class _Wait:
    __slots__ = ("reason", "said", "since", "touched")

    def __init__(self, now: float) -> None:
        self.since = now
        self.touched = now
        self.reason = ""
        self.said = False


class Waits:
    """``_lock`` guards the table. A request that is served at once takes no lock."""

    def __init__(self, loud_after: float = LOUD_AFTER) -> None:
        self._loud_after = loud_after
        self._lock = threading.Lock()
        self._waits: dict[Waiting, _Wait] = {}

    def failed(self, what: Waiting, reason: str) -> None:
        """An attempt failed, or still waits, for ``reason``."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            wait = self._waits.setdefault(what, _Wait(now))
            wait.touched = now
            wait.reason = reason or wait.reason
            say = not wait.said and now - wait.since >= self._loud_after
            wait.said = wait.said or say
        if say:
            lane, op, key = what
            log.warning(
                "%s of %s (%s) waits for the store, %.0f s so far: %s",
                op,
                key,
                lane,
                now - wait.since,
                reason,
            )

    def served(self, what: Waiting) -> None:
        """The store answered."""
        if what not in self._waits:
            return
        with self._lock:
            wait = self._waits.pop(what, None)
        if wait is not None and wait.said:
            lane, op, key = what
            log.warning("%s of %s (%s) goes on after %.0f s", op, key, lane, time.monotonic() - wait.since)

    @property
    def any(self) -> bool:
        """Whether something waits; without a lock, for the hot path."""
        return bool(self._waits)

    def longest(self) -> tuple[float, str]:
        """Seconds of the longest wait, and its reason."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            oldest = min(self._waits.values(), key=lambda wait: wait.since, default=None)
        return (now - oldest.since, oldest.reason) if oldest is not None else (0.0, "")

    def _forget(self, now: float) -> None:
        for what in [w for w, wait in self._waits.items() if now - wait.touched > FORGOTTEN_AFTER]:
            del self._waits[what]


def waiting(lane: str, op: str, key: str) -> Waiting:
    """The name of a wait: packs and pages are put under new names each time."""
    if op == "put":
        for place in ("/packs/", "/pages/"):
            head, found, _ = key.partition(place)
            if found:
                return lane, op, head + found
    return lane, op, key
