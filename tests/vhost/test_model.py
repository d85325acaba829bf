"""Random requests of random form, from one or two front-ends after another, against bytes in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from core_rig import BLOCK, pattern
from front_end import (
    ALL_PROTOCOL,
    DISCARD,
    F_EVENT,
    F_INDIRECT,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    WRITE_ZEROES,
    FrontEnd,
    Memory,
    Region,
    ranges,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sessions import under_way
from vhost_rig import VhostRig
from waiting import wait_for

SIZE = 4 * BLOCK
SECTORS = SIZE // 512

places = st.integers(0, SECTORS - 1)
lengths = st.one_of(st.integers(1, 16), st.integers(1, 300))
forms = st.fixed_dictionaries(
    {
        "cuts": st.lists(st.integers(1, 150 * 512), max_size=6),
        "indirect": st.booleans(),
        "split_header": st.booleans(),
        "queue": st.integers(0, 1),
        "region": st.integers(1, 2),
    }
)
steps = st.one_of(
    st.tuples(st.just("read"), places, lengths, forms),
    st.tuples(st.just("write"), places, lengths, forms),
    st.tuples(st.just("zero"), places, lengths, st.sampled_from([DISCARD, WRITE_ZEROES])),
    st.tuples(st.just("flush"), places, lengths, forms),
    st.tuples(st.just("beyond"), places, lengths, forms),
    st.tuples(st.just("reconnect"), places, lengths, st.booleans()),
    st.tuples(st.just("region"), places, lengths, st.just(None)),
    st.tuples(st.just("stop"), places, lengths, st.integers(0, 1)),
    st.tuples(st.just("commit"), places, lengths, st.just(None)),
)
batches = st.lists(st.lists(steps, min_size=1, max_size=4), min_size=1, max_size=12)


class Machine:
    """A front-end and what its volume should hold."""

    def __init__(self, vhost: VhostRig, without: int, protocol: int) -> None:
        self.vhost = vhost
        memory = Memory([Region(0, 1 << 20), Region(4 << 20, 4 << 20, offset=8192), Region(8 << 20, 4 << 20)])
        self.guest: FrontEnd = vhost.front_end(memory, queues=2, num=128, without=without, protocol=protocol)
        self.indirect = not without & F_INDIRECT
        self.model = bytearray(SIZE)
        self.stamp = 0

    def run(self, batch: list[Any]) -> None:
        """Writes of one batch must not overlap what else is in it: then one is left out."""
        mark = self.guest.memory.mark()
        pending: list[tuple[Any, int, int, bytes | None]] = []
        taken: list[tuple[int, int]] = []
        for kind, sector, count, how in batch:
            count = min(count, SECTORS - sector)
            if any(sector < end and first < sector + count for first, end in taken):
                continue
            taken.append((sector, sector + count))
            asked = self.ask(kind, sector, count, how)
            if asked is not None:
                pending.append(asked)
        for one, queue, status, expected in pending:
            got, data = self.guest.finish(one, queue)
            assert got == status
            if expected is not None:
                assert data == expected
        self.guest.memory.release(mark)
        for kind, sector, count, how in batch:
            self.control(kind, sector, count, how)

    def ask(self, kind: str, sector: int, count: int, how: Any) -> tuple[Any, int, int, bytes | None] | None:
        guest, at, end = self.guest, sector * 512, (sector + count) * 512
        if kind in ("read", "write", "flush", "beyond"):
            how = {**how, "indirect": how["indirect"] and self.indirect}
            queue = how["queue"]
        status, expected = OK, None
        if kind == "read":
            one = guest.prepare(IN, sector, room=count * 512, **how)
            expected = bytes(self.model[at:end])
        elif kind == "write":
            self.stamp += 1
            data = pattern(self.stamp, count * 512)
            self.model[at:end] = data
            one = guest.prepare(OUT, sector, out=data, **how)
        elif kind == "zero":
            queue = 0
            half = count // 2
            self.model[at:end] = bytes(end - at)
            one = guest.prepare(how, out=ranges((sector, half, 0), (sector + half, count - half, 0)))
        elif kind == "flush":
            one = guest.prepare(FLUSH, queue=queue)
        elif kind == "beyond":
            one = guest.prepare(IN, SECTORS - sector % 8 + 8, room=8192, **how)
            status = IOERR
        else:
            return None
        guest.submit(one, queue=queue)
        return one, queue, status, expected

    def control(self, kind: str, sector: int, count: int, how: Any) -> None:
        guest = self.guest
        if kind == "reconnect":
            guest.reconnect()
        elif kind == "stop":
            ring = guest.rings[how]
            assert guest.base(how) == ring.last_used
            guest.start(how, ring)
        elif kind == "region" and guest.protocol & 1 << 15:
            guest.remove_region(guest.memory.regions[2])
            guest.add_region(guest.memory.regions[2])
        elif kind == "commit":
            self.vhost.vol.commit()

    def end(self) -> None:
        assert self.guest.read(0, SIZE) == self.model
        if self.guest.protocol & 1 << 12:
            assert under_way(self.guest) == []


@pytest.mark.parametrize(
    ("without", "protocol"), [(0, ALL_PROTOCOL), (F_EVENT, ALL_PROTOCOL), (F_INDIRECT, 0)]
)
def test_random_requests(make_vhost: Callable[..., VhostRig], without: int, protocol: int) -> None:
    vhost = make_vhost(size=SIZE, log_limit=1 << 30)

    @given(batches)
    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    def run(history: list[list[Any]]) -> None:
        vhost.vol.core.zero(0, SIZE)
        machine = Machine(vhost, without, protocol)
        try:
            for batch in history:
                machine.run(batch)
            machine.end()
        finally:
            machine.guest.close()
            vhost.front_ends.remove(machine.guest)
            wait_for(lambda: vhost.transport.in_use("v") == "", "the end of the session")

    run()
