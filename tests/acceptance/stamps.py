"""Guests that stamp what they write, and what of it a later owner of the volume must still have."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from nbd_client import RequestFailed
from node import KIB, Node

SECTOR = 4 * KIB
SLOTS = 32
"""Places that a guest stamps one after another, again and again."""
STRIDE = 128 * KIB
AREA = SLOTS * STRIDE
"""Bytes of the volume that belong to one guest."""
EIO = 5
NOTHING = bytes(16)


class Habit(NamedTuple):
    """``sectors`` of a write, ``flush_every`` how many writes (0: never), ``pause`` seconds between them."""

    sectors: int
    flush_every: int
    pause: float


class Guest(threading.Thread):
    """Reads its area, then stamps it over one connection, one request at a time, until that fails.

    ``found`` is what was there: stamps by sector. ``stamps`` are those sent since, in order, and the first
    ``acknowledged`` of them answered. ``committed``: what an answered FLUSH vouches for.
    """

    def __init__(self, node: Node, name: str, number: int, life: int, habit: Habit) -> None:
        super().__init__(name=f"guest-{number}-{life}", daemon=True)
        self.node = node
        self.number = number
        self.habit = habit
        self.found: dict[int, bytes] = {}
        self.stamps: list[tuple[int, bytes]] = []
        self.sent: list[float] = []
        """When each write was sent, and below when it was answered."""
        self.answered: list[float] = []
        self.acknowledged = 0
        self.committed = 0
        self.error: BaseException | None = None
        self.ended = 0.0
        self.ready = threading.Event()
        self._name = name
        self._life = life
        self._leave = threading.Event()

    def run(self) -> None:
        try:
            with self.node.nbd(self._name) as client:
                for sector in self.sectors():
                    stamp = client.pread(sector * SECTOR, SECTOR)
                    assert stamp == stamp[:16] * (SECTOR // 16), f"sector {sector} is torn"
                    self.found[sector] = stamp[:16]
                self.ready.set()
                count = 0
                while not self._leave.wait(self.habit.pause):
                    count += 1
                    self._write(client, count)
                    if self.habit.flush_every and count % self.habit.flush_every == 0:
                        before = self.acknowledged
                        client.flush()
                        self.committed = before
        except BaseException as error:
            self.error = error
        finally:
            self.ended = time.monotonic()
            self.ready.set()

    def _write(self, client: object, count: int) -> None:
        first = self._first(count % SLOTS)
        stamp = struct.pack("<QQ", self._life, count)
        self.sent.append(time.monotonic())
        self.stamps += [(first + i, stamp) for i in range(self.habit.sectors)]
        client.pwrite(first * SECTOR, stamp * (SECTOR // 16 * self.habit.sectors))  # type: ignore[attr-defined]
        self.answered.append(time.monotonic())
        self.acknowledged = len(self.stamps)

    def _first(self, slot: int) -> int:
        return (self.number * AREA + slot * STRIDE) // SECTOR

    def sectors(self) -> list[int]:
        """Those that this guest writes."""
        return [self._first(slot) + i for slot in range(SLOTS) for i in range(self.habit.sectors)]

    def leave(self) -> None:
        """Stop writing, politely."""
        self._leave.set()

    def saw_eio(self) -> bool:
        """Whether it ended with an I/O error."""
        return isinstance(self.error, RequestFailed) and self.error.errno == EIO

    # -- what is left of its writes ----------------------------------------------------------------

    def kept(self, found: dict[int, bytes]) -> int:
        """How many of its stamps ``found`` has: it must be those up to one of them, all that a FLUSH
        vouched for among them, and below them what the guest found itself.
        """
        place = {item: i for i, item in enumerate(self.stamps)}
        count = max((place[item] + 1 for item in found.items() if item in place), default=0)
        assert found == {**self.found, **dict(self.stamps[:count])}, f"{self.name}: not a prefix"
        # What a prefix ends with may be overwritten stamps only in part: none is younger than `count`.
        assert count >= self.committed, f"{self.name}: {self.committed} committed, {count} kept"
        return count

    def last_kept_sent(self, count: int) -> float:
        """When the newest of ``count`` kept stamps was sent."""
        return self.sent[(count - 1) // self.habit.sectors] if count else 0.0

    def first_lost_answered(self, count: int) -> float:
        """When the first that is not among ``count`` kept ones was acknowledged."""
        write = count // self.habit.sectors
        return self.answered[write] if write < len(self.answered) else float("inf")

    def unsent(self, count: int) -> tuple[dict[int, bytes], set[tuple[int, bytes]]]:
        """The acknowledged stamps behind the ``count`` kept ones, newest of each sector; and those of the
        write that was never answered, which may be there instead.
        """
        return dict(self.stamps[count : self.acknowledged]), set(self.stamps[self.acknowledged :])


def check_common_prefix(guests: Sequence[Guest], counts: Sequence[int]) -> None:
    """Over all guests: nothing is kept that was sent after a write was acknowledged which is lost."""
    newest = max(guest.last_kept_sent(count) for guest, count in zip(guests, counts, strict=True))
    lost = min(guest.first_lost_answered(count) for guest, count in zip(guests, counts, strict=True))
    assert newest <= lost, "a later write is there, an earlier one is not"
