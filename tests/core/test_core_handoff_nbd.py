"""NBD connections that move between two engines, as they do between two processes."""

from __future__ import annotations

import random
import socket
import threading
import time

import pytest
from core_handoff_rig import (
    DISC,
    FLUSH,
    FUA,
    READ,
    REPLY,
    TRIM,
    WRITE,
    ZEROES,
    Client,
    MakeRig,
    Pair,
    request,
)
from core_rig import BLOCK, MIB, SECTOR, Background, Vol, pattern
from waiting import wait_for

from glidefs.core import handoff
from glidefs.core.volume import install_retry


def connect(vol: Vol, conn_id: int = 1) -> Client:
    client = Client()
    vol.core.attach_nbd(client.server, conn_id)
    return client


def test_a_connection_goes_on(pair: Pair) -> None:
    client = connect(pair.vol)
    client.send(request(WRITE, 1, 0, SECTOR), pattern(1, SECTOR))
    assert client.reply() == (1, 0, b"")
    pair.warm()
    pair.move()
    client.send(request(READ, 2, 0, SECTOR))
    assert client.reply(SECTOR) == (2, 0, pattern(1, SECTOR))
    client.send(request(DISC, 3))
    assert client.socket.recv(1) == b""


def detached(pair: Pair) -> None:
    """A connection was ended: its read that waited for a fault of block 0 was cancelled, the fault not."""
    client = connect(pair.vol, 9)
    client.send(request(READ, 1, 0, BLOCK))
    wait_for(lambda: pair.vol.core.info().parked == 1, "the read waits")
    pair.vol.core.detach_nbd(9)
    wait_for(lambda: pair.vol.core.info().parked == 0, "it is cancelled")


def test_an_answer_that_nobody_waits_for_comes_while_frozen(pair: Pair) -> None:
    """The next read of that block faults again and does not wait for an answer that has been."""
    answers = pair.vol.answers
    pair.vol.base = {0: pattern(7, BLOCK)}
    with pair.old.hold():
        detached(pair)
        handoff.freeze(pair.vol.core)
        pair.vol.answers = lambda _: [install_retry(0, 1)]  # type: ignore[method-assign]
    wait_for(lambda: pair.old.faults_seen, "the fault is answered")
    time.sleep(0.1)
    pair.vol.answers = answers  # type: ignore[method-assign]
    handoff.unfreeze(pair.vol.core)
    assert Background(lambda: pair.vol.core.pread(0, BLOCK)).result() == pattern(7, BLOCK)


def test_one_answer_for_many_blocks_of_which_one_is_waited_for_by_nobody(pair: Pair) -> None:
    answers = pair.vol.answers
    pair.vol.base = {0: pattern(7, BLOCK)}
    with pair.old.hold():
        detached(pair)
        pair.vol.answers = lambda _: [install_retry(0, 100)]  # type: ignore[method-assign]
    wait_for(lambda: pair.old.faults_seen, "the fault is answered")
    time.sleep(0.1)
    pair.vol.answers = answers  # type: ignore[method-assign]
    assert Background(lambda: pair.vol.core.pread(0, BLOCK)).result() == pattern(7, BLOCK)


def test_a_read_that_waits_for_the_store(pair: Pair) -> None:
    pair.vol.base = {0: pattern(7, BLOCK)}
    client = connect(pair.vol)
    pair.warm()
    with pair.old.hold():
        client.send(request(READ, 5, 0, BLOCK), request(READ, 6, BLOCK, SECTOR))
        wait_for(lambda: pair.vol.core.info().parked == 2, "the reads wait")
        pair.move()
        first = client.reply()[0]
    data = {5: pattern(7, BLOCK), 6: bytes(SECTOR)}
    assert client.receive(len(data[first])) == data[first]
    second = 11 - first
    assert client.reply(len(data[second])) == (second, 0, data[second])


@pytest.mark.parametrize("cut", [1, 20, 28, 100, 28 + SECTOR - 1])
def test_a_request_that_is_half_received(pair: Pair, cut: int) -> None:
    client = connect(pair.vol)
    whole = request(WRITE, 9, SECTOR, SECTOR) + pattern(3, SECTOR)
    client.send(whole[:cut])
    time.sleep(0.05)
    pair.warm()
    pair.move()
    client.send(whole[cut:])
    assert client.reply() == (9, 0, b"")
    assert pair.vol.core.pread(SECTOR, SECTOR) == pattern(3, SECTOR)


def test_payload_of_a_refused_write_is_thrown_away_there_too(pair: Pair) -> None:
    client = connect(pair.vol)
    length = 33 * MIB  # longer than is taken
    client.send(request(WRITE, 1, 0, length), bytes(MIB))
    assert client.reply() == (1, 22, b"")
    pair.warm()
    pair.move()
    client.send(bytes(length - MIB), request(READ, 2, 0, SECTOR))
    assert client.reply(SECTOR) == (2, 0, bytes(SECTOR))


def test_replies_that_the_client_has_not_taken(pair: Pair) -> None:
    pair.vol.core.pwrite(0, pattern(4, 4 * MIB))
    client = connect(pair.vol)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    for cookie in range(8):
        client.send(request(READ, cookie, 0, 4 * MIB))
    time.sleep(0.2)
    pair.warm()
    pair.move()
    for cookie in range(8):
        assert client.reply(4 * MIB) == (cookie, 0, pattern(4, 4 * MIB))


def test_writes_that_wait_for_log_space(make_rig: MakeRig) -> None:
    pair = Pair(make_rig, log_limit=64 * SECTOR)
    client = connect(pair.vol)
    for cookie in range(64):
        client.send(request(WRITE, cookie, cookie * SECTOR, SECTOR), pattern(cookie, SECTOR))
    wait_for(lambda: pair.vol.core.info().parked, "writers wait")
    pair.warm()
    pair.move()
    done = Background(lambda: [client.reply() for _ in range(64)])
    while not done.done:
        pair.vol.commit()
        time.sleep(0.01)
    assert sorted(done.result()) == [(cookie, 0, b"") for cookie in range(64)]
    for i in range(64):
        assert pair.vol.core.pread(i * SECTOR, SECTOR) == pattern(i, SECTOR)


def test_a_write_that_waits_for_its_commit_is_not_written_again(make_rig: MakeRig) -> None:
    pair = Pair(make_rig, flush_store=True)
    client = connect(pair.vol)
    client.send(request(WRITE, 1, 0, SECTOR, FUA), pattern(1, SECTOR))
    wait_for(lambda: pair.vol.core.info().parked, "it waits for the commit")
    client.send(request(WRITE, 2, 0, SECTOR), pattern(2, SECTOR))
    assert client.reply() == (2, 0, b"")
    pair.warm()
    pair.move()
    assert client.quiet()
    pair.vol.commit()
    assert client.reply() == (1, 0, b"")
    assert pair.vol.core.pread(0, SECTOR) == pattern(2, SECTOR)


def test_aborted_handoffs_leave_connections_as_they_were(pair: Pair) -> None:
    client = connect(pair.vol)
    handoff.freeze(pair.vol.core)
    client.send(request(WRITE, 1, 0, SECTOR), pattern(1, SECTOR), request(READ, 2, 0, SECTOR))
    assert client.quiet()
    assert len(handoff.connections(pair.vol.core)) == 1
    handoff.unfreeze(pair.vol.core)
    assert client.reply() == (1, 0, b"")
    assert client.reply(SECTOR) == (2, 0, pattern(1, SECTOR))


class Load(threading.Thread):
    """Pipelined requests on one connection; every reply is checked against what was written."""

    DEPTH = 24

    def __init__(self, client: Client, first: int, blocks: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.client, self.first, self.blocks = client, first, blocks
        self.random = random.Random(seed)
        self.data: dict[int, bytes] = {}
        self.stop = threading.Event()
        self.count = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.error = error

    def _run(self) -> None:
        waiting: dict[int, tuple[int, int, int]] = {}
        busy: set[int] = set()
        while waiting or not self.stop.is_set():
            while len(waiting) < self.DEPTH and not self.stop.is_set():
                sector = self.random.randrange(self.blocks)
                if sector in busy:
                    break
                busy.add(sector)
                self._ask(waiting, sector)
            if waiting:
                self._answer(waiting, busy)

    def _ask(self, waiting: dict[int, tuple[int, int, int]], sector: int) -> None:
        kind = self.random.choice([READ, READ, WRITE, WRITE, WRITE, TRIM, ZEROES, FLUSH])
        cookie = self.count = self.count + 1
        half = kind != FLUSH and self.random.random() < 0.2
        start, length = (512, 1024) if half else (0, SECTOR)
        flags = FUA if kind in (WRITE, TRIM) and self.random.random() < 0.1 else 0
        at = (self.first + sector) * SECTOR + start
        payload = b""
        old = self.data.get(sector, bytes(SECTOR))
        if kind in (WRITE, TRIM, ZEROES):
            new = pattern(cookie, length) if kind == WRITE else bytes(length)
            payload = new if kind == WRITE else b""
            self.data[sector] = old[:start] + new + old[start + length :]
        waiting[cookie] = (kind, sector, start)
        header = request(kind, cookie, 0, 0) if kind == FLUSH else request(kind, cookie, at, length, flags)
        self.client.send(header, payload)

    def _answer(self, waiting: dict[int, tuple[int, int, int]], busy: set[int]) -> None:
        _, error, cookie = REPLY.unpack(self.client.receive(REPLY.size))
        kind, sector, start = waiting.pop(cookie)  # KeyError: answered twice
        assert error == 0, (kind, error)
        if kind == READ:
            length = 1024 if start else SECTOR
            expected = self.data.get(sector, bytes(SECTOR))[start : start + length]
            assert self.client.receive(length) == expected, f"sector {sector} is wrong"
        busy.discard(sector)


@pytest.mark.parametrize("seed", range(3))
def test_many_handoffs_under_load(make_rig: MakeRig, seed: int) -> None:
    """Small log and cache, uploads between the handoffs: every request is answered once, and right."""
    pair = Pair(make_rig, log_limit=512 * SECTOR, cache_bytes=16 * BLOCK)
    chance = random.Random(seed)
    loads = [Load(connect(pair.vol, i + 1), i * 2048, 1024, seed * 100 + i) for i in range(3)]
    for load in loads:
        load.start()
    for _ in range(15):
        for _ in range(chance.randrange(4)):
            pair.vol.commit(retire=chance.random() < 0.7)
            time.sleep(chance.random() * 0.02)
        if chance.random() < 0.2:
            handoff.freeze(pair.vol.core)
            time.sleep(0.01)
            handoff.unfreeze(pair.vol.core)
        pair.warm()
        time.sleep(chance.random() * 0.03)
        pair.move()
    for load in loads:
        load.stop.set()
    until = time.monotonic() + 60
    while any(load.is_alive() for load in loads):
        assert time.monotonic() < until, "a request has no answer"
        pair.vol.commit()
        time.sleep(0.01)
    assert [load.error for load in loads] == [None] * 3
    for load in loads:
        assert load.count > 100
        for sector, data in load.data.items():
            assert pair.vol.core.pread((load.first + sector) * SECTOR, SECTOR) == data
