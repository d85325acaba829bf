"""One flight per block: a reader that wants a block being fetched waits for that fetch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from glidefs.core.carry import AbsentBlock


class _Flight:
    __slots__ = ("landed", "waiters")

    def __init__(self) -> None:
        self.landed: threading.Event | None = None  # made for the first who waits on a thread
        self.waiters: list[AbsentBlock] = []


class Flights:
    """Keys of the block cache that are being fetched. ``_lock`` guards the table and what is in it.

    ``tell(waiters)`` is called without the lock, on the thread that landed, for those who did not wait on a
    thread.
    """

    def __init__(self, tell: Callable[[list[AbsentBlock]], None] | None = None) -> None:
        self.tell = tell
        self._lock = threading.Lock()
        self._table: dict[bytes, _Flight] = {}

    def __len__(self) -> int:
        return len(self._table)

    def claim(self, keys: Iterable[bytes]) -> tuple[set[bytes], set[threading.Event]]:
        """Keys that are now the caller's to fetch, and events of the flights of the others.

        The caller must :meth:`land` its own before it waits for others, so no two wait in a circle.
        """
        mine: set[bytes] = set()
        others: set[threading.Event] = set()
        flight = _Flight()  # one for all: they land together
        with self._lock:
            for key in keys:
                found = self._table.setdefault(key, flight)
                if found is flight:
                    mine.add(key)
                else:
                    found.landed = found.landed or threading.Event()
                    others.add(found.landed)
        return mine, others

    def board(self, keys: Sequence[bytes], waiters: Sequence[AbsentBlock | None]) -> list[bool]:
        """For each key whether it is now the caller's to fetch, in a flight of its own.

        Where it is not, its waiter, if there is one, is told of at the landing.
        """
        mine: list[bool] = []
        with self._lock:
            for key, waiter in zip(keys, waiters, strict=True):
                found = self._table.get(key)
                mine.append(found is None)
                if found is None:
                    self._table[key] = _Flight()
                elif waiter is not None:
                    found.waiters.append(waiter)
        return mine

    def land(self, keys: Iterable[bytes], answered: Callable[[AbsentBlock], bool] | None = None) -> None:
        """The fetch of these keys ended, well or not. Who was ``answered`` by it need not be told."""
        with self._lock:
            flights = {self._table.pop(key) for key in keys}
        waiters: list[AbsentBlock] = []
        for flight in flights:
            if flight.landed is not None:
                flight.landed.set()
            waiters += flight.waiters
        if answered is not None:
            waiters = [waiter for waiter in waiters if not answered(waiter)]
        if waiters and self.tell is not None:
            self.tell(waiters)
