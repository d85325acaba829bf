"""One flight per block: a reader that wants a block being fetched waits for that fetch."""

from __future__ import annotations

import threading
from collections.abc import Iterable


class Flights:
    """Keys of the block cache that are being fetched. ``_lock`` guards the table."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._table: dict[bytes, threading.Event] = {}

    def claim(self, keys: Iterable[bytes]) -> tuple[set[bytes], set[threading.Event]]:
        """Keys that are now the caller's to fetch, and events of the flights of the others.

        The caller must :meth:`land` its own before it waits for others, so no two wait in a circle.
        """
        mine: set[bytes] = set()
        others: set[threading.Event] = set()
        landed = threading.Event()  # one for all: they land together
        with self._lock:
            for key in keys:
                event = self._table.setdefault(key, landed)
                if event is landed:
                    mine.add(key)
                else:
                    others.add(event)
        return mine, others

    def land(self, keys: Iterable[bytes]) -> None:
        """The fetch of these keys ended, well or not."""
        with self._lock:
            events = {self._table.pop(key) for key in keys}
        for event in events:
            event.set()
