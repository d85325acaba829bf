"""Cold reads that the core carries: plans as Python makes them, answers of servers, good and bad."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from certificates import Tls
from core_rig import BLOCK, MIB
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from glidefs.core.carry import ABSENT, BlockPlans, Carried, News
from glidefs.core.engine import Engine, EngineConfig
from glidefs.formats.pack import ENTRY_SIZE, FULL_MASK, PackEntry, PackIndex, payload_hash
from glidefs.manifest.keys import scoped_key
from glidefs.reading.fetch import plan_ranges
from glidefs.reading.plan import plan_block
from glidefs.store.base import Source
from glidefs.store.s3.range_http import pack_address

_ENTRY = struct.Struct("<QIIII16s")
NOBODY = 12345
"""The cookie of no volume: what is carried for it only fills the cache."""


def index_of(key: str, entries: list[PackEntry]) -> PackIndex:
    return PackIndex(key, b"".join(_ENTRY.pack(*entry) for entry in sorted(entries)))


@st.composite
def packs(draw: st.DrawFn) -> list[PackIndex]:
    """A few packs, with whole, partial and zeroed blocks in places that follow each other."""
    found = []
    for number in range(draw(st.integers(0, 5))):
        at, entries = 16, []
        for block in sorted(draw(st.sets(st.integers(0, 12), max_size=10))):
            mask = draw(st.sampled_from([0, 1, 0xFF, 0xF0F0, FULL_MASK, FULL_MASK]))
            zeros = draw(st.sampled_from([0, 0xF00, FULL_MASK])) & ~mask
            if not mask and not zeros:
                continue
            stored = draw(st.integers(1, mask.bit_count() * 4096)) if mask else 0
            digest = payload_hash(bytes([number, block]))
            entries.append(PackEntry(block, mask, zeros, at if mask else 0, stored, digest))
            at += stored + draw(st.sampled_from([0, 0, 5000]))
        found.append(index_of(f"p{number}", entries))
    return found


@given(packs(), st.sets(st.integers(0, 14), min_size=1, max_size=15), st.sampled_from([None, "a", "prefix"]))
def test_plans_are_those_of_python(indices: list[PackIndex], wanted: set[int], prefix: str | None) -> None:
    blocks = sorted(wanted)
    plans = BlockPlans([([index.records for index in indices], blocks)], prefix)
    for row, (block, key, _, count, state, _) in enumerate(plans.rows()):
        expected = plan_block(block, indices)
        assert (state == ABSENT) == bool(expected.mask)
        parts = [
            (indices[pack].key, PackEntry(block, mask, zeros, offset, stored, digest))
            for pack, mask, zeros, offset, stored, digest in plans.parts(row)
        ]
        assert parts == [(part.key, part.entry) for part in expected.parts]
        assert count == len(parts)
        if expected.mask:
            assert key == (expected.key() if prefix is None else scoped_key(expected.key(), prefix))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    cache = tmp_path_factory.mktemp("carry") / "blocks"
    with Engine(EngineConfig(cache_dir=cache, workers=1, cache_bytes=64 * MIB)) as made:
        yield made


def carry(
    engine: Engine, index: PackIndex, blocks: list[int], source: Source, *, gap: int = 0, limit: int = 2 * MIB
) -> list[Carried]:
    """What became of the tasks, after all of them ended."""
    plans = BlockPlans([([index.records], blocks)], None)
    tasks = plans.carry(engine, NOBODY, 1, 0, {0: source}, gap=gap, limit=limit)
    news, ended = News(engine), list[Carried]()
    while len(ended) < tasks:
        found = news.next(20_000).carried
        assert found, "a task does not end"
        ended += found
    return ended


@settings(deadline=None, max_examples=30)
@given(indices=packs(), gap=st.sampled_from([0, 6000]), limit=st.sampled_from([BLOCK, 2 * MIB]))
def test_ranges_are_those_of_python(engine: Engine, indices: list[PackIndex], gap: int, limit: int) -> None:
    """As many requests, whatever becomes of them: the file is not there."""
    for index in indices:
        expected = [plan_block(entry.block, [index]) for entry in index.entries() if entry.mask]
        wanted = [part for plan in expected for part in plan.payloads()]
        blocks = [plan.block for plan in expected]
        if not blocks:
            continue
        ended = carry(engine, index, blocks, Source(b"/nowhere"), gap=gap, limit=limit)
        assert len(ended) == len(plan_ranges(wanted, gap, limit))
        assert {one.err for one in ended} == {-errno.ENOENT}


def two_blocks() -> tuple[bytes, PackIndex, list[bytes]]:
    """A pack with two blocks that no cache has, side by side."""
    data = [os.urandom(BLOCK), os.urandom(BLOCK)]
    entries = [
        PackEntry(i, FULL_MASK, 0, 16 + i * BLOCK, BLOCK, payload_hash(block)) for i, block in enumerate(data)
    ]
    assert len(index_of("p", entries).records) == 2 * ENTRY_SIZE
    return bytes(16) + b"".join(data), index_of("p", entries), data


def cached(engine: Engine, block: bytes) -> bool:
    (slot,) = engine.cache.lookup([payload_hash(block)])
    if slot is None:
        return False
    same = engine.cache.read(slot) == block
    engine.cache.unpin(slot)
    assert same
    return True


def test_a_file_is_read_and_what_does_not_verify_is_not_kept(engine: Engine, tmp_path: Path) -> None:
    pack, index, data = two_blocks()
    path = tmp_path / "pack"
    damaged = bytearray(pack)
    damaged[16 + BLOCK + 7] ^= 1
    path.write_bytes(damaged)
    (ended,) = carry(engine, index, [0, 1], Source(os.fsencode(path)))
    assert ended.err == -errno.EUCLEAN
    assert cached(engine, data[0])  # the good one of the two
    assert not cached(engine, data[1])
    path.write_bytes(pack[: 16 + BLOCK + 100])
    (ended,) = carry(engine, index, [1], Source(os.fsencode(path)))
    assert ended.err == -errno.ENODATA
    path.write_bytes(pack)
    (ended,) = carry(engine, index, [1], Source(os.fsencode(path)))
    assert (ended.err, ended.gets, ended.bytes) == (0, 1, BLOCK)
    assert cached(engine, data[1])


Answer = Callable[[bytes, int], bytes | None]
"""From the range that is asked for and the number of the request on its connection; None: hang."""


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return Tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["plain", "tls"])
def maybe_tls(request: pytest.FixtureRequest, tls: Tls) -> Tls | None:
    return tls if request.param == "tls" else None


class Server:
    """One that answers as it is told to; ``connections`` counts those that it took.

    ``patience`` (seconds) is how long its source is waited for: longer than a busy machine needs for a TLS
    handshake, unless the test is about a wait that ends.
    """

    def __init__(self, pack: bytes, answer: Answer, tls: Tls | None = None, *, patience: float = 10) -> None:
        self.pack, self.answer, self.connections = pack, answer, 0
        self._tls = tls
        self.heads: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        where = self._listener.getsockname()
        self.source = Source(b"/p?x=1", b"host:1", pack_address(socket.AF_INET, where), patience, patience)
        if tls is not None:
            self.source = structs.replace(self.source, server=b"store.test", ca=bytes(tls.ca))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._quietly, args=(sock,), daemon=True).start()

    def _quietly(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client has heard enough
            if self._tls is not None:
                sock = self._tls.server.wrap_socket(sock, server_side=True)
            self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        number, data = 0, b""
        with sock:
            while True:
                while b"\r\n\r\n" not in data:
                    more = sock.recv(65536)
                    if not more:
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                self.heads.append(head)
                first, last = (int(x) for x in head.partition(b"bytes=")[2].split(b"\r")[0].split(b"-"))
                answer = self.answer(self.pack[first : last + 1], number)
                if answer is None:
                    sock.recv(1)  # until the client gives up
                    return
                span = f"bytes {first}-{last}/{len(self.pack)}".encode()
                sock.sendall(answer.replace(b"SPAN", span))
                number += 1
                if answer.endswith(b"BYE"):
                    return

    def close(self) -> None:
        self._listener.close()


def good(body: bytes, _number: int = 0) -> bytes:
    return b"HTTP/1.1 206 OK\r\nContent-Length: %d\r\ncontent-RANGE:  SPAN \r\n\r\n%b" % (len(body), body)


WRONG: dict[str, Answer] = {
    "the whole object": lambda body, n: good(body).replace(b" 206 ", b" 200 "),
    "an error": lambda body, n: b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n",
    "another range": lambda body, n: good(body).replace(b"SPAN", b"bytes 0-131071/262160"),
    "no range": lambda body, n: good(body).replace(b"content-RANGE", b"x"),
    "a range that only begins so": lambda body, n: good(body).replace(b"SPAN", b"bytes 16-1310870/9999999"),
    "another length": lambda body, n: good(body).replace(b"131072", b"131073"),
    "no length": lambda body, n: good(body).replace(b"Content-Length", b"x"),
    "chunks": lambda body, n: good(body).replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n", 1),
    "compressed": lambda body, n: good(body).replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n", 1),
    "half of it": lambda body, n: good(body)[:70000] + b"BYE",
    "half a head": lambda body, n: b"HTTP/1.1 206 OK\r\nContent-LeBYE",
    "nothing": lambda body, n: b"BYE",
    "no HTTP": lambda body, n: b"SSH-2.0-OpenSSH_9.2\r\n\r\n" + bytes(200000),
    "a head without end": lambda body, n: b"HTTP/1.1 206 OK\r\n" + b"X: y\r\n" * 3000,
    "other bytes": lambda body, n: good(bytes(len(body))),
    "no answer": lambda body, n: None,
}


@pytest.mark.parametrize("what", WRONG)
def test_an_answer_that_is_not_the_range_fails(engine: Engine, what: str, maybe_tls: Tls | None) -> None:
    pack, index, data = two_blocks()
    server = Server(pack, WRONG[what], maybe_tls, patience=0.5)  # one of them never answers
    (ended,) = carry(engine, index, [0], server.source)
    server.close()
    assert ended.err < 0
    assert not cached(engine, data[0])


def test_connections_are_kept_and_a_stale_one_costs_nothing(engine: Engine, maybe_tls: Tls | None) -> None:
    pack, index, data = two_blocks()
    server = Server(pack, good, maybe_tls)
    for block in (0, 1):
        (ended,) = carry(engine, index, [block], server.source)
        assert (ended.err, ended.bytes) == (0, BLOCK)
        assert cached(engine, data[block])
    kept = server.connections
    assert kept <= 2  # one for each thread of the carrier at most
    assert server.heads[0].startswith(b"GET /p?x=1 HTTP/1.1\r\nHost: host:1\r\n")
    engine.cache.evict_all()
    server.answer = lambda body, number: good(body) + b"BYE"  # and closed behind more than was asked for
    for block in (0, 1, 0, 1):
        engine.cache.evict_all()
        (ended,) = carry(engine, index, [block], server.source)
        assert ended.err == 0
    assert server.connections > kept
    server.close()


def test_a_server_is_who_its_certificate_says(engine: Engine, tls: Tls, tmp_path: Path) -> None:
    pack, index, data = two_blocks()
    server = Server(pack, good, tls)
    other = Tls(tmp_path)
    believed = {
        "its name": {},
        "its address": {"server": b"127.0.0.1"},
        "anybody": {"server": b"x", "ca": b""},
    }
    refused = {
        "another name": {"server": b"other.test"},
        "another address": {"server": b"127.0.0.2"},
        "another CA": {"ca": bytes(other.ca)},
        "no CA": {"ca": b"/does/not/exist"},
    }
    for changes in refused.values():
        (ended,) = carry(engine, index, [0], structs.replace(server.source, **changes))
        assert ended.err < 0
        assert not server.heads, "it was asked before it was believed"
    for changes in believed.values():
        engine.cache.evict_all()
        (ended,) = carry(engine, index, [0], structs.replace(server.source, **changes))
        assert ended.err == 0
        assert cached(engine, data[0])
    server.close()


def test_a_server_that_does_not_speak_tls(engine: Engine, tls: Tls) -> None:
    pack, index, _ = two_blocks()
    server = Server(pack, good, patience=0.5)  # it waits for the end of a line
    (ended,) = carry(
        engine, index, [0], structs.replace(server.source, server=b"store.test", ca=bytes(tls.ca))
    )
    assert ended.err < 0
    server.close()


def test_one_that_never_shakes_hands(engine: Engine, tls: Tls) -> None:
    _, index, _ = two_blocks()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = pack_address(socket.AF_INET, deaf.getsockname())
        source = Source(b"/p?x=1", b"host:1", address, 20.0, 0.3, b"store.test", bytes(tls.ca))
        (ended,) = carry(engine, index, [0], source)
    assert ended.err == -errno.ETIMEDOUT


def test_connections_are_bounded(engine: Engine) -> None:
    """More gets than connections wait for one; all are answered."""
    sectors = [os.urandom(4096) for _ in range(1400)]
    pack = bytes(16) + b"".join(sector + bytes(4096) for sector in sectors)
    index = index_of(
        "p",
        [PackEntry(i, 1, 0, 16 + i * 8192, 4096, payload_hash(sector)) for i, sector in enumerate(sectors)],
    )
    hold = threading.Event()

    def late(body: bytes, _number: int) -> bytes:
        hold.wait(20)
        return good(body)

    server = Server(pack, late)
    source = structs.replace(server.source, timeout=30.0, connect_timeout=30.0)
    threading.Timer(1.5, hold.set).start()
    ended = carry(engine, index, list(range(len(sectors))), source)
    assert [one.err for one in ended] == [0] * len(sectors)
    assert server.connections <= 256 * min(4, len(os.sched_getaffinity(0)))
    other = Server(pack, good)  # all connections lead to the first
    (one,) = carry(
        engine, index_of("q", [PackEntry(0, 1, 0, 16, 4096, payload_hash(sectors[0]))]), [0], other.source
    )
    assert one.err == 0
    server.close()
    other.close()


def test_nobody_listens(engine: Engine) -> None:
    _, index, _ = two_blocks()
    with socket.socket() as unheard:  # has the address, so that nobody else gets it
        unheard.bind(("127.0.0.1", 0))
        source = Source(b"/p?x=1", b"host:1", pack_address(socket.AF_INET, unheard.getsockname()), 10, 10)
        (ended,) = carry(engine, index, [0], source)
    assert ended.err == -errno.ECONNREFUSED


def test_an_engine_closes_while_something_is_on_its_way(tmp_path: Path) -> None:
    pack, index, _ = two_blocks()
    server = Server(pack, lambda body, number: None)
    with Engine(EngineConfig(cache_dir=tmp_path / "blocks", workers=1, cache_bytes=64 * MIB)) as engine:
        plans = BlockPlans([([index.records], [0, 1])], None)
        assert plans.carry(engine, NOBODY, 1, 0, {0: server.source}, gap=0, limit=BLOCK) == 2
    server.close()
