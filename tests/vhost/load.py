"""A guest under way all the time, which knows what it wrote."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from front_end import DISCARD, FLUSH, IN, OK, OUT, WRITE_ZEROES, FrontEnd, Pending, ranges

SLOT = 64 << 10
"""Bytes of the volume that one request at a time has for itself."""


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
        self._places = [guest.memory.mark() for _ in range(depth)]
        self._pending: dict[tuple[int, int], tuple[int, Pending, Callable[[bytes], None]]] = {}
        self.guest.request(WRITE_ZEROES, out=ranges((0, depth * SLOT // 512, 0)))
        first = guest.memory.alloc(0)
        for slot in range(depth):  # memory of its own for each
            guest.memory.alloc(SLOT + (8 << 10))
            self._places[slot] = {**guest.memory.mark(), guest.memory.regions[-1].guest: first}
            first = guest.memory.alloc(0)

    def finish(self, deadline: float = 60.0) -> None:
        """Wait for what is under way, compare everything, raise what went wrong."""
        self._end.set()
        self.join(deadline)
        if self.error is not None:
            raise self.error
        assert not self.is_alive(), "the load does not end"
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
                slot, pending, check = self._pending.pop((index, head))
                assert self.guest.memory.read(pending.status, 1)[0] == OK
                check(b"".join(self.guest.memory.read(at, length) for at, length in pending.pieces))
                self.done += 1
                count += 1
                if not self._end.wait(self.pause):
                    self._next(slot)
        return count

    def _next(self, slot: int) -> None:
        guest, random_ = self.guest, self._random
        queue = slot % len(guest.rings)
        guest.memory.release(self._places[slot])
        kind = random_.choice([IN, IN, OUT, OUT, OUT, FLUSH, WRITE_ZEROES, DISCARD])
        first = random_.randrange(SLOT // 512)
        count = random_.randint(1, SLOT // 512 - first)
        if random_.random() < 0.7:  # whole sectors of 4 KiB
            first, count = first // 8 * 8, max(8, count // 8 * 8)
        sector, model = slot * SLOT // 512 + first, self._model[slot]
        cuts = [random_.randrange(count * 512)] if random_.random() < 0.3 else []
        indirect = random_.random() < 0.5

        def nothing(_data: bytes) -> None:
            pass

        check = nothing
        if kind == IN:
            expected = bytes(model[first * 512 : (first + count) * 512])

            def compare(data: bytes) -> None:
                assert data == expected, f"slot {slot}: {count} sectors from {first} are wrong"

            check = compare
            one = guest.prepare(IN, sector, room=count * 512, cuts=cuts, indirect=indirect, queue=queue)
        elif kind == OUT:
            data = random_.randbytes(count * 512)
            model[first * 512 : (first + count) * 512] = data
            one = guest.prepare(OUT, sector, out=data, cuts=cuts, indirect=indirect, queue=queue)
        elif kind == FLUSH:
            one = guest.prepare(FLUSH, queue=queue)
        else:
            model[first * 512 : (first + count) * 512] = bytes(count * 512)
            one = guest.prepare(kind, out=ranges((sector, count, 0)), indirect=indirect, queue=queue)
        self._pending[queue, one.head] = (slot, one, check)
        guest.submit(one, queue=queue)
