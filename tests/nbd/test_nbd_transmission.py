"""The transmission phase, byte by byte: order, errors, ends of connections, many of them."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from nbd_client import (
    BLOCK_STATUS,
    DISC,
    FLUSH,
    FUA,
    READ,
    REQUEST,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    RequestFailed,
    request,
)
from nbd_serve import MIB, Served
from waiting import wait_for

SIZE = 64 * MIB
MAX_PAYLOAD = 32 * MIB


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("nbd")) as made:
        made.add("disk", SIZE)
        yield made


def connect(served: Served, name: str = "disk", tcp: bool = False) -> RawClient:
    client = RawClient(served.tcp if tcp else served.path)
    client.greet().go(name)
    return client


def in_time(work: Callable[[], object], seconds: float = 20.0) -> None:
    """Run in a thread: a hang fails the test instead of hanging it."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "hangs"
    if failures:
        raise failures[0]


def _send_quietly(client: RawClient, data: bytes) -> None:
    with contextlib.suppress(OSError):
        client.send(data)


# ---- requests ----


@pytest.mark.parametrize("tcp", [False, True])
def test_data_against_a_model(served: Served, tcp: bool) -> None:
    """Two connections take turns with reads, writes, zeroes and trims of any 512-byte range."""
    choose = random.Random(99 + tcp)
    window = 3 * 131072 + 1536
    model = bytearray(window)
    base = 131072 - 2048
    with connect(served, tcp=tcp) as first, connect(served, tcp=tcp) as second:
        for step in range(600):
            client = choose.choice((first, second))
            start = choose.randrange(window // 512) * 512
            length = min(choose.choice((512, 1024, 4096, 8192, 65536, 200_704)), window - start)
            kind = choose.choice((READ, READ, WRITE, WRITE, WRITE, TRIM, WRITE_ZEROES, FLUSH))
            flags = choose.choice((0, 0, FUA))
            if kind == WRITE:
                data = choose.randbytes(length)
                client.pwrite(base + start, data, flags)
                model[start : start + length] = data
            elif kind in (TRIM, WRITE_ZEROES):
                client.call(kind, base + start, length, flags=flags)
                model[start : start + length] = bytes(length)
            elif kind == FLUSH:
                client.flush()
            else:
                assert client.pread(base + start, length) == model[start : start + length], step
        assert second.pread(base, window) == model
        assert first.pread(base - 4096, 4096) == bytes(4096)


def test_pipelined_requests_all_get_their_own_reply(served: Served) -> None:
    with connect(served) as client:
        blocks = [os.urandom(4096) for _ in range(200)]
        stream = b"".join(
            request(WRITE, index, index * 4096, 4096) + block for index, block in enumerate(blocks)
        )
        client.send(stream)
        cookies = []
        for _ in blocks:
            cookie, error = client.reply()
            assert error == 0
            cookies.append(cookie)
        assert sorted(cookies) == list(range(200))
        client.send(b"".join(request(READ, index, index * 4096, 4096) for index in range(200)))
        seen = {}
        for _ in blocks:
            cookie, error = client.reply()
            assert error == 0
            seen[cookie] = client.read(4096)
        assert [seen[index] for index in range(200)] == blocks


def test_requests_in_pieces(served: Served) -> None:
    """One byte at a time, and a large write in odd pieces."""
    with connect(served) as client:
        for byte in request(WRITE, 1, 0, 512) + b"z" * 512:
            client.send(bytes([byte]))
        assert client.reply() == (1, 0)
        for byte in request(READ, 2, 0, 512):
            client.send(bytes([byte]))
        assert client.reply() == (2, 0)
        assert client.read(512) == b"z" * 512
        data = os.urandom(MIB)
        stream = request(WRITE, 3, 4 * MIB, MIB) + data + request(READ, 4, 0, 512)
        for start in range(0, len(stream), 70_001):
            client.send(stream[start : start + 70_001])
        for _ in range(2):
            cookie, error = client.reply()
            assert error == 0
            if cookie == 4:
                assert client.read(512) == b"z" * 512
        assert client.pread(4 * MIB, MIB) == data


@pytest.mark.parametrize("kind", [BLOCK_STATUS, 8, 9, 99, 0xFFFF])
def test_unknown_commands_are_invalid_and_have_no_payload(served: Served, kind: int) -> None:
    with connect(served) as client:
        with pytest.raises(RequestFailed) as caught:
            client.call(kind, 0, 4096)
        assert caught.value.errno == errno.EINVAL
        assert client.pread(0, 512) == bytes(512)


@pytest.mark.parametrize("kind", [READ, TRIM, WRITE_ZEROES, WRITE])
def test_requests_of_no_length_are_answered(served: Served, kind: int) -> None:
    with connect(served) as client:
        sent = client.submit(kind, 4096, 0)
        cookie, error = client.reply()
        assert cookie == sent
        assert error in (0, errno.EINVAL)
        assert client.pread(4096, 512) == bytes(512)


def test_zeroes_of_the_whole_volume_are_quick(served: Served) -> None:
    served.add("large", 1 << 41)
    with connect(served, "large") as client:
        client.pwrite(1 << 40, b"x" * 4096)
        started = time.monotonic()
        step = (1 << 32) - 4096
        for kind in (TRIM, WRITE_ZEROES):
            for index in range(64):
                client.call(kind, (1 << 40) - (1 << 32) + index * step, step)
        assert time.monotonic() - started < 10
        assert client.pread(1 << 40, 4096) == bytes(4096)


def test_wrong_magic_ends_the_connection(served: Served) -> None:
    with connect(served) as client, connect(served) as other:
        client.send(struct.pack(">IHHQQI", 0x25609514, 0, READ, 1, 0, 512))
        assert client.hung_up()
        assert other.pread(0, 512) == bytes(512)
    wait_for(lambda: not served.server.connections())


def test_payload_of_a_refused_write_is_skipped(served: Served) -> None:
    with connect(served) as client:
        for offset, length in ((SIZE, 4096), (100, 4096), (0, 4095), (SIZE - 512, MAX_PAYLOAD)):
            with pytest.raises(RequestFailed):
                client.pwrite(offset, request(DISC, 7) * (length // 28) + bytes(length % 28))
            assert client.pread(0, 512) == bytes(512)


@pytest.mark.parametrize("length", [MAX_PAYLOAD + 512, 0x7FFFFFFF, 0xFFFFFE00])
def test_too_large_requests(served: Served, length: int) -> None:
    """A read is refused; a write is refused or ends the connection, and takes no such memory."""
    with connect(served) as client:
        with pytest.raises(RequestFailed) as caught:
            client.call(READ, 0, length)
        assert caught.value.errno == errno.EINVAL
        client.submit(WRITE, 0, length)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.hung_up()
    with connect(served) as other:
        assert other.pread(0, 512) == bytes(512)


# ---- ends of connections ----


def test_disc_finishes_what_was_asked_before(served: Served) -> None:
    with connect(served) as client:
        stream = b"".join(request(WRITE, i, i * 131072, 131072) + bytes([i + 1]) * 131072 for i in range(16))
        client.send(stream + request(DISC, 99))
        assert client.hung_up()
    with connect(served) as other:
        for i in range(16):
            assert other.pread(i * 131072, 131072) == bytes([i + 1]) * 131072
    wait_for(lambda: not served.server.connections())


def test_half_closed_connection_gets_its_replies(served: Served) -> None:
    with connect(served) as client:
        client.pwrite(0, b"q" * 4096)
        client.send(b"".join(request(READ, i, 0, 4096) for i in range(8)))
        client.socket.shutdown(socket.SHUT_WR)
        for _ in range(8):
            assert client.reply()[1] == 0
            assert client.read(4096) == b"q" * 4096
        assert client.hung_up()
    wait_for(lambda: not served.server.connections())


def test_half_closed_connection_with_replies_not_yet_read(served: Served) -> None:
    """The end of the requests arrives while replies wait for the client to read."""
    with connect(served, tcp=True) as client:
        client.pwrite(0, b"q" * MIB)
        count = 48
        client.send(b"".join(request(READ, i, 0, MIB) for i in range(count)))
        wait_for(lambda: served.volumes[1].stats().ops[0] >= 8)
        client.socket.shutdown(socket.SHUT_WR)
        time.sleep(0.2)  # nothing to wait for: the server may notice the end at any time
        for _ in range(count):
            assert client.reply()[1] == 0
            assert client.read(MIB) == b"q" * MIB
        assert client.hung_up()


@pytest.mark.parametrize("sent", [1, 27, 28, 29, 28 + 4096, 28 + MIB - 1])
def test_disconnect_in_the_middle_of_a_write_changes_nothing(served: Served, sent: int) -> None:
    with connect(served) as client:
        client.pwrite(0, b"o" * MIB)
        client.send((request(WRITE, 9, 0, MIB) + b"n" * MIB)[:sent])
    wait_for(lambda: not served.server.connections())
    with connect(served) as other:
        assert other.pread(0, MIB) == b"o" * MIB


def test_reset_with_replies_unread(served: Served) -> None:
    with connect(served, tcp=True) as client:
        client.send(b"".join(request(READ, i, 0, MIB) for i in range(64)))
        client.read(100)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: not served.server.connections())
    with connect(served, tcp=True) as other:
        assert other.pread(0, 512) == bytes(512)


def test_a_client_that_does_not_read_delays_nobody(served: Served) -> None:
    with connect(served) as slow, connect(served) as other:
        slow.pwrite(0, b"s" * MIB)
        count = 100
        sender = threading.Thread(
            target=slow.send, args=(b"".join(request(READ, i, 0, MIB) for i in range(count)),), daemon=True
        )
        sender.start()
        for step in range(200):
            other.pwrite(2 * MIB + step * 4096, bytes([step]) * 4096)
            assert other.pread(2 * MIB + step * 4096, 4096) == bytes([step]) * 4096
        for _ in range(count):
            assert slow.reply()[1] == 0
            assert slow.read(MIB) == b"s" * MIB
        sender.join(20)


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_replies_that_nobody_reads_take_bounded_memory(served: Served) -> None:
    """A request of 28 bytes asks for a reply of 4 MiB: what is not sent must count as in flight."""
    with connect(served) as client, connect(served) as other:
        client.pwrite(0, os.urandom(4 * MIB))
        before = resident_bytes()
        stream = b"".join(request(READ, i, 0, 4 * MIB) for i in range(500))
        sender = threading.Thread(target=_send_quietly, args=(client, stream), daemon=True)
        sender.start()
        ops = -1
        while ops != (ops := served.volumes[1].stats().ops[0]):  # until the server stops taking more
            assert resident_bytes() - before < 400 * MIB
            time.sleep(0.3)
        assert other.pread(0, 512)
        client.socket.shutdown(socket.SHUT_RDWR)
        sender.join(20)
    wait_for(lambda: not served.server.connections())


def test_sixty_four_connections(served: Served) -> None:
    clients = [connect(served, tcp=bool(i % 2)) for i in range(64)]
    try:
        wait_for(lambda: len(served.server.connections("disk")) == 64)
        wait_for(lambda: served.volumes[1].info().connections == 64)
        for round_ in range(8):
            for i, client in enumerate(clients):
                client.submit(WRITE, i * 65536 + round_ * 4096, 4096, data=bytes([i + 1]) * 4096)
            for client in clients:
                assert client.reply()[1] == 0
        clients[0].flush()
        for i, client in enumerate(clients):
            assert client.pread(((i + 1) % 64) * 65536, 32768) == bytes([(i + 1) % 64 + 1]) * 32768
    finally:
        for client in clients:
            client.close()
    wait_for(lambda: not served.server.connections())
    wait_for(lambda: served.volumes[1].info().connections == 0)


def test_connections_come_and_go_without_leaks(served: Served) -> None:
    def churn() -> None:
        for step in range(50):
            client = connect(served, tcp=bool(step % 2))
            if step % 3 == 0:
                client.send(request(READ, 1, 0, 65536))
            elif step % 3 == 1:
                client.disconnect()
            client.close()

    churn()
    wait_for(lambda: not served.server.connections())
    before = len(os.listdir("/proc/self/fd"))
    churn()
    wait_for(lambda: not served.server.connections())
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)


# ---- ends from the server's side ----


def test_close_export_with_reads_that_wait_for_the_store(served: Served) -> None:
    served.answering.clear()
    with connect(served) as client, connect(served) as other:
        other.pwrite(0, b"w" * 4096)
        client.send(b"".join(request(READ, i, i * 131072, 4096) for i in range(1, 9)))
        wait_for(lambda: served.volumes[1].info().parked > 0)
        del served.exports["disk"]
        in_time(lambda: served.server.close_export("disk"))
        assert client.hung_up()
        assert other.hung_up()
    assert served.server.connections() == []


def test_close_export_with_replies_that_nobody_reads(served: Served) -> None:
    with connect(served) as client:
        client.send(b"".join(request(READ, i, 0, MIB) for i in range(64)))
        wait_for(lambda: served.volumes[1].stats().ops[0] >= 8)
        del served.exports["disk"]
        in_time(lambda: served.server.close_export("disk"))
        assert client.hung_up()
    assert served.volumes[1].info().connections == 0


def test_volume_closed_with_replies_that_nobody_reads(served: Served) -> None:
    with connect(served) as client:
        client.send(b"".join(request(READ, i, 0, MIB) for i in range(64)))
        wait_for(lambda: served.volumes[1].stats().ops[0] >= 8)
        in_time(served.volumes[1].close)
        assert client.hung_up()


def test_close_export_under_load(served: Served) -> None:
    stop = threading.Event()
    problems: list[BaseException] = []

    def load(index: int) -> None:
        with connect(served) as client:
            try:
                step = 0
                while not stop.is_set():
                    step += 1
                    client.pwrite(
                        (index * 64 + step % 64) * 4096,
                        bytes([step % 256]) * 4096,
                        FUA if step % 9 == 0 else 0,
                    )
            except (EOFError, ConnectionError):
                pass
            except RequestFailed as error:
                if error.errno != errno.ESHUTDOWN:
                    problems.append(error)

    threads = [threading.Thread(target=load, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: served.volumes[1].stats().ops[1] > 500)
    del served.exports["disk"]
    in_time(lambda: served.server.close_export("disk"))
    stop.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not problems
    assert served.volumes[1].info().connections == 0


def test_volume_closed_with_requests_in_flight(served: Served) -> None:
    served.answering.clear()
    client = connect(served)
    client.send(request(READ, 1, 0, 4096) + request(WRITE, 2, 8 * MIB, 4096) + bytes(4096))
    wait_for(lambda: served.volumes[1].info().parked > 0)
    in_time(served.volumes[1].close)
    assert client.hung_up()
    client.close()
    wait_for(lambda: not served.server.connections())
    with RawClient(served.path) as late:
        late.greet().go("disk")
        assert late.hung_up()


def test_failed_volume_answers_with_the_error(served: Served) -> None:
    with connect(served) as client:
        client.flush()
        served.volumes[1].fail(errno.EIO)
        for kind, payload in ((READ, b""), (WRITE, bytes(4096)), (FLUSH, b"")):
            with pytest.raises(RequestFailed) as caught:
                client.call(kind, 0, len(payload) if kind != READ else 4096, data=payload)
            assert caught.value.errno == errno.EIO


def test_reply_header_is_the_simple_one(served: Served) -> None:
    with connect(served) as client:
        client.send(REQUEST.pack(0x25609513, 0, READ, 0x0123456789ABCDEF, 0, 512))
        assert client.read(16) == bytes.fromhex("67446698 00000000 0123456789abcdef")
        assert client.read(512) == bytes(512)
