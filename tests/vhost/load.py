"""A guest under way all the time, which knows what it wrote, and whose memory is watched.

Each request has an area of that memory. When it is answered the area is filled with a pattern and rests
while others are used: what is written there then is an answer that came twice, or late.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from front_end import DISCARD, FLUSH, IN, OK, OUT, WRITE_ZEROES, FrontEnd, Pending, ranges

SLOT = 64 << 10
"""Bytes of the volume that one request at a time has for itself."""
AREA = SLOT + (8 << 10)
"""Bytes of memory of one request: its data, header, status and indirect table."""
RESTING = 24
"""Areas that rest."""
UNTOUCHED = b"\xd5"


class Areas:
    """The guest's last region of memory, which has no rings. Only a request under way writes into it."""

    def __init__(self, guest: FrontEnd, count: int) -> None:
        self._memory = guest.memory
        region = guest.memory.regions[-1]
        self._key = region.guest
        self._other = guest.memory.mark()
        first = guest.memory.alloc(0)
        self._resting = deque(first + i * AREA for i in range(count))
        self._tail = first + count * AREA
        self._end = region.guest + region.size
        assert self._tail < self._end, "the guest has no memory for so many requests"
        guest.memory.write(first, UNTOUCHED * (self._end - first))

    def _check(self, at: int, length: int) -> None:
        found = self._memory.read(at, length)
        wrong = length - len(found.lstrip(UNTOUCHED))
        assert wrong == length, f"the guest's memory at {at + wrong:#x}, which nobody uses, was written to"

    def take(self) -> int:
        """The area that has rested longest. What is allocated from here on comes from it."""
        at = self._resting.popleft()
        self._check(at, AREA)
        self._memory.release({**self._other, self._key: at})
        return at

    def rest(self, at: int) -> None:
        """Its request was answered."""
        self._memory.write(at, UNTOUCHED * AREA)
        self._resting.append(at)

    def check(self) -> None:
        """Of all that rest, and what never was anybody's."""
        for at in self._resting:
            self._check(at, AREA)
        self._check(self._tail, self._end - self._tail)


class Load(threading.Thread):
    """Random requests at `depth`, each compared with what the guest wrote, until :meth:`finish`.

    ``lost``: called when the queue is silent for long; it may connect the front-end again.
    """

    def __init__(self, guest: FrontEnd, *, depth: int = 16, seed: int = 0, pause: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.guest = guest
        self.depth = depth
        self.pause = pause
        self.done = 0
        self.longest = 0.0
        self.error: BaseException | None = None
        self.lost: Callable[[], None] | None = None
        self._random = random.Random(seed)
        self._end = threading.Event()
        self._model = [bytearray(SLOT) for _ in range(depth)]
        self._pending: dict[tuple[int, int], tuple[int, int, Pending, Callable[[bytes], None]]] = {}
        self.prepare_volume()
        self._areas = Areas(guest, depth + RESTING)

    def prepare_volume(self) -> None:
        """What is there before the first request."""
        self.guest.request(WRITE_ZEROES, out=ranges((0, self.depth * SLOT // 512, 0)))

    def finish(self, deadline: float = 60.0) -> None:
        """Wait for what is under way, compare everything, raise what went wrong."""
        self._end.set()
        self.join(deadline)
        if self.error is not None:
            raise self.error
        assert not self.is_alive(), "the load does not end"
        self._areas.check()
        self.compare_all()

    def compare_all(self) -> None:
        """The volume with what the guest wrote."""
        for slot, model in enumerate(self._model):
            assert self.guest.read(slot * SLOT, SLOT) == model

    def run(self) -> None:
        try:
            for slot in range(self.depth):
                self._next(slot)
            last = time.monotonic()
            while self._pending:
                answered = self._collect()
                now = time.monotonic()
                if answered:
                    self.longest = max(self.longest, now - last)
                    last = now
                else:
                    time.sleep(0.0005)
                if self.lost is not None and now - last > 0.05:
                    self.lost()
                assert now - last < 60, f"{len(self._pending)} requests have no answer"
        except BaseException as error:
            self.error = error

    def _collect(self) -> int:
        count = 0
        for index, ring in enumerate(self.guest.rings):
            for head in ring.collect():
                slot, area, pending, check = self._pending.pop((index, head))
                assert self.guest.memory.read(pending.status, 1)[0] == OK
                check(b"".join(self.guest.memory.read(at, length) for at, length in pending.pieces))
                self._areas.rest(area)
                self.done += 1
                count += 1
                if not self._end.wait(self.pause):
                    self._next(slot)
        return count

    def _next(self, slot: int) -> None:
        queue = slot % len(self.guest.rings)
        area = self._areas.take()
        one, check = self.draw(slot, queue)
        self._pending[queue, one.head] = (slot, area, one, check)
        self.guest.submit(one, queue=queue)

    def draw(self, slot: int, queue: int) -> tuple[Pending, Callable[[bytes], None]]:
        """The next request of a slot, and what looks at the data of its answer."""
        guest, random_ = self.guest, self._random
        kind = random_.choice([IN, IN, OUT, OUT, OUT, FLUSH, WRITE_ZEROES, DISCARD])
        first = random_.randrange(SLOT // 512)
        count = random_.randint(1, SLOT // 512 - first)
        if random_.random() < 0.7:  # whole sectors of 4 KiB
            first, count = first // 8 * 8, max(8, count // 8 * 8)
        sector, model = slot * SLOT // 512 + first, self._model[slot]
        cuts = [random_.randrange(count * 512)] if random_.random() < 0.3 else []
        indirect = random_.random() < 0.5
        if kind == IN:
            expected = bytes(model[first * 512 : (first + count) * 512])
            one = guest.prepare(IN, sector, room=count * 512, cuts=cuts, indirect=indirect, queue=queue)
            return one, _is(expected, f"slot {slot}: {count} sectors from {first}")
        if kind == FLUSH:
            return guest.prepare(FLUSH, queue=queue), _anything
        data = random_.randbytes(count * 512) if kind == OUT else bytes(count * 512)
        model[first * 512 : (first + count) * 512] = data
        if kind == OUT:
            return guest.prepare(OUT, sector, out=data, cuts=cuts, indirect=indirect, queue=queue), _anything
        one = guest.prepare(kind, out=ranges((sector, count, 0)), indirect=indirect, queue=queue)
        return one, _anything


class Reads(Load):
    """Reads of all of a volume whose content does not change."""

    def __init__(self, guest: FrontEnd, content: bytes, **how: Any) -> None:
        self._content = content
        super().__init__(guest, **how)

    def prepare_volume(self) -> None:
        pass

    def compare_all(self) -> None:
        for at in range(0, len(self._content), SLOT):
            assert self.guest.read(at, SLOT) == self._content[at : at + SLOT]

    def draw(self, slot: int, queue: int) -> tuple[Pending, Callable[[bytes], None]]:
        random_ = self._random
        count = random_.choice([8, 8, 32, SLOT // 512])
        sector = random_.randrange((len(self._content) // 512 - count) // 8) * 8
        cuts = [random_.randrange(count * 512)] if random_.random() < 0.3 else []
        one = self.guest.prepare(IN, sector, room=count * 512, cuts=cuts, queue=queue)
        expected = self._content[sector * 512 : (sector + count) * 512]
        return one, _is(expected, f"{count} sectors from {sector}")


def _anything(_data: bytes) -> None:
    pass


def _is(expected: bytes, what: str) -> Callable[[bytes], None]:
    def compare(data: bytes) -> None:
        assert data == expected, f"{what} are wrong"

    return compare
