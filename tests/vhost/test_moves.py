"""Front-ends that move with their volume to another engine, as in a handoff, and notice nothing."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from core_handoff_rig import Pair
from core_rig import BLOCK, CoreRig, pattern
from front_end import ALL_PROTOCOL, FLUSH, IN, OK, OUT, FrontEnd
from load import Load
from test_sessions import record, under_way
from vhost_rig import VhostRig
from waiting import wait_for

from glidefs.core import handoff
from glidefs.transport.vhost_user.messages import Request


class Moving:
    """A volume and its front-ends in an engine that changes."""

    def __init__(self, make_rig: Callable[..., CoreRig], directory: Path, **config: Any) -> None:
        self.pair = Pair(make_rig, **config)
        self.directory = directory
        self.vhost = VhostRig(self.pair.old, self.pair.vol, directory).start()

    def move(self, *, revive: bool = False) -> None:
        """As the coordinator does it, in one process. ``revive``: the same transport takes it up again."""
        pair, old = self.pair, self.vhost
        pair.warm()
        old.transport.pause()
        position = handoff.freeze(pair.vol.core)
        handoff.give_cache(pair.old.engine)
        state, fds = old.transport.hand_over("v")
        listeners = [(path, at.dup()) for path, at in old.transport.listeners()]
        new = VhostRig(pair.new, pair.next, self.directory)
        new.front_ends, old.front_ends = old.front_ends, []
        new.transport.pause()
        new.transport.inherit(listeners)
        handoff.activate(pair.next.core, position)
        new.path = new.transport.start(new.attachment()).device
        if state:
            new.transport.take_over("v", state, fds)
        old.transport.forget()
        old.rig.engine.end_workers()
        handoff.unfreeze(pair.next.core)
        handoff.take_cache(pair.new.engine)
        new.transport.resume()
        old.close()
        pair.vol.close()
        pair.next.config.pop("standby")
        pair.old, pair.vol = pair.new, pair.next
        self.vhost = new

    def give_up(self) -> None:
        """Frozen, and then it goes on here."""
        transport = self.vhost.transport
        transport.pause()
        handoff.freeze(self.pair.vol.core)
        state, fds = transport.hand_over("v")
        assert state
        import os

        for fd in fds:
            os.close(fd)
        handoff.unfreeze(self.pair.vol.core)
        transport.resume()


@pytest.fixture
def moving(make_rig: Callable[..., CoreRig], tmp_path: Path) -> Iterator[Moving]:
    made = Moving(make_rig, tmp_path / "s", log_limit=512 << 20)
    yield made
    made.vhost.close()


@pytest.mark.parametrize("protocol", [0, ALL_PROTOCOL])
def test_a_front_end_notices_nothing(moving: Moving, protocol: int) -> None:
    guest = moving.vhost.front_end(queues=2, protocol=protocol)
    guest.write(0, pattern(1, 8192))
    moving.move()
    assert guest.read(0, 8192) == pattern(1, 8192)
    guest.write(4096, pattern(2, 4096), queue=1)
    moving.move()
    assert guest.read(4096, 4096, queue=1) == pattern(2, 4096)
    assert guest.base(0) == 2
    if protocol:
        assert moving.vhost.resize(128 << 20) == ""
        assert guest.channel is not None
        assert len(guest.channel.recv(12)) == 12
    assert guest.capacity() == (128 if protocol else 64) << 20
    guest.sock.close()
    wait_for(lambda: moving.vhost.transport.in_use("v") == "", "the end of the session")
    assert moving.vhost.front_end().read(4096, 4096) == pattern(2, 4096)


def test_no_front_end_at_all(moving: Moving) -> None:
    moving.move()
    assert moving.vhost.front_end().read(0, 512) == bytes(512)


@pytest.mark.parametrize("protocol", [0, ALL_PROTOCOL])
def test_what_waits_moves(moving: Moving, protocol: int) -> None:
    moving.pair.vol.base[3] = pattern(3, BLOCK)
    guest = moving.vhost.front_end(protocol=protocol)
    with moving.pair.old.hold():
        read = guest.prepare(IN, 3 * BLOCK // 512, room=8192, cuts=[512])
        direct = guest.prepare(IN, 3 * BLOCK // 512, room=8192)
        part = guest.prepare(OUT, 3 * BLOCK // 512 + 16, out=pattern(7, 512))
        guest.submit(read, direct, part)
        guest.write(0, pattern(1, 4096))
        moving.move()
    assert guest.finish(read) == (OK, pattern(3, BLOCK)[:8192])
    assert guest.finish(direct) == (OK, pattern(3, BLOCK)[:8192])
    assert guest.finish(part)[0] == OK
    assert guest.read(3 * BLOCK + 8192, 512) == pattern(7, 512)
    assert guest.read(0, 4096) == pattern(1, 4096)


def test_a_write_that_waits_for_its_commit_is_not_done_again(
    make_rig: Callable[..., CoreRig], tmp_path: Path
) -> None:
    """It may have been overwritten by then."""
    moving = Moving(make_rig, tmp_path / "s", flush_store=True)
    guest = moving.vhost.front_end()
    assert guest.tell(Request.SET_CONFIG, struct.pack("<III", 32, 1, 0) + b"\0") == 0
    first = guest.prepare(OUT, 0, out=pattern(1, 4096))
    guest.submit(first)
    wait_for(lambda: under_way(guest) == [first.head], "the write")
    moving.pair.vol.core.pwrite(0, pattern(2, 4096))
    moving.move()
    assert record(guest)[4][first.head][:2] == (1, 1)
    moving.pair.vol.commit()
    assert guest.finish(first)[0] == OK
    assert moving.pair.vol.core.pread(0, 4096) == pattern(2, 4096)
    flush = guest.prepare(FLUSH)
    guest.submit(flush)
    moving.vhost.close()


def test_a_stop_that_waits_moves(moving: Moving) -> None:
    moving.pair.vol.base[3] = pattern(3, BLOCK)
    guest = moving.vhost.front_end()
    with moving.pair.old.hold():
        read = guest.prepare(IN, 3 * BLOCK // 512, room=4096)
        guest.submit(read)
        wait_for(lambda: under_way(guest), "the request")
        guest.send(Request.GET_VRING_BASE, struct.pack("<II", 0, 0))
        guest.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            guest.sock.recv(1)
        guest.sock.settimeout(20)
        moving.move()
    payload, _ = guest.receive(Request.GET_VRING_BASE)
    assert struct.unpack("<II", payload) == (0, 1)
    assert guest.finish(read) == (OK, pattern(3, BLOCK)[:4096])


def test_half_a_message_moves(moving: Moving) -> None:
    guest: FrontEnd = moving.vhost.front_end()
    message = struct.pack("<III", Request.GET_CONFIG, 1, 20) + struct.pack("<III", 0, 8, 0) + bytes(8)
    guest.sock.send(message[:15])
    moving.vhost.transport.in_use("v")
    moving.move()
    guest.sock.send(message[15:])
    assert len(guest.receive(Request.GET_CONFIG)[0]) == 20


def test_a_handoff_that_is_called_off(moving: Moving) -> None:
    moving.pair.vol.base[3] = pattern(3, BLOCK)
    guest = moving.vhost.front_end()
    with moving.pair.old.hold():
        read = guest.prepare(IN, 3 * BLOCK // 512, room=4096)
        guest.submit(read)
        moving.give_up()
        guest.write(0, pattern(1, 4096))
    assert guest.finish(read) == (OK, pattern(3, BLOCK)[:4096])
    assert guest.read(0, 4096) == pattern(1, 4096)


@pytest.mark.parametrize("protocol", [0, ALL_PROTOCOL])
def test_moves_under_load(moving: Moving, protocol: int) -> None:
    guest = moving.vhost.front_end(queues=2, num=128, protocol=protocol)
    load = Load(guest)
    load.start()
    for round_ in range(6):
        done = load.done
        wait_for(lambda done=done: load.error or load.done > done + 50, "requests")
        moving.move() if round_ % 3 else moving.give_up()
    load.finish()
