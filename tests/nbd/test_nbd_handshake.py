"""The handshake, against a core that only keeps the sockets."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbd_client import RawClient, Refused, export_request
from nbd_fakes import GIB, Bench
from waiting import wait_for

from glidefs.transport.nbd import proto
from glidefs.transport.nbd.negotiation import NbdExport
from glidefs.transport.nbd.proto import Info, Option, Reply, TransmissionFlag
from glidefs.transport.nbd.server import HandshakeLimits

# ---- choosing an export ----


def test_go_starts_transmission(bench: Bench) -> None:
    with bench.connect() as client:
        info = client.greet().go("disk")
        assert info.size == GIB
        flags = TransmissionFlag(info.flags)
        assert flags == (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.SEND_FLUSH
            | TransmissionFlag.SEND_FUA
            | TransmissionFlag.SEND_TRIM
            | TransmissionFlag.SEND_WRITE_ZEROES
            | TransmissionFlag.CAN_MULTI_CONN
            | TransmissionFlag.SEND_CACHE
            | TransmissionFlag.SEND_FAST_ZERO
        )
        (conn_id,) = bench.core.wait_attached()
        mine, read_only = bench.core.attached[conn_id]
        assert not read_only
        assert os.get_blocking(mine.fileno()), "io_uring does not wait on a non-blocking socket"
        mine.sendall(b"hello")
        assert client.read(5) == b"hello"
        (about,) = bench.server.connections("disk")
        assert about.conn_id == conn_id
        assert f"pid={os.getpid()}" in about.peer
        assert bench.server.connections("base") == []
        bench.server.connection_closed(conn_id, errno.ECONNRESET)
        assert bench.server.connections() == []


def test_bytes_sent_early_are_left_to_the_core(bench: Bench) -> None:
    with bench.connect() as client:
        client.read(18)
        option = struct.pack(">QII", proto.IHAVEOPT, Option.EXPORT_NAME, 4) + b"disk"
        client.send(struct.pack(">I", 3) + option + b"early request")
        client.read(10)
        (conn_id,) = bench.core.wait_attached()
        mine, _ = bench.core.attached[conn_id]
        mine.settimeout(20)
        assert mine.recv(100) == b"early request"


@pytest.mark.parametrize("zeroes", [True, False])
def test_export_name(bench: Bench, zeroes: bool) -> None:
    with bench.connect() as client:
        info = client.greet(1 if zeroes else 3).export_name("base", zeroes=zeroes)
        assert info.size == 2 * GIB
        (conn_id,) = bench.core.wait_attached()
        bench.core.attached[conn_id][0].sendall(b"x")
        assert client.read(1) == b"x"


def test_read_only_offers_nothing_that_writes(bench: Bench) -> None:
    with bench.connect() as client:
        flags = TransmissionFlag(client.greet().go("base").flags)
        assert TransmissionFlag.READ_ONLY in flags
        assert not flags & (TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES)
        assert not flags & TransmissionFlag.SEND_FAST_ZERO
        (conn_id,) = bench.core.wait_attached()
        assert bench.core.attached[conn_id][1] is True


def test_export_name_unknown_hangs_up(bench: Bench) -> None:
    with bench.connect() as client:
        client.greet().option(Option.EXPORT_NAME, b"nothing")
        assert client.hung_up()


def test_info_then_go_and_information_asked_for(bench: Bench) -> None:
    with bench.connect() as client:
        asked = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE, 77)
        told = client.greet().infos(Option.INFO, "disk", asked)
        assert told[Info.NAME] == b"disk"
        assert told[Info.DESCRIPTION].startswith(b"GlideFS")
        assert struct.unpack(">III", told[Info.BLOCK_SIZE]) == (512, 4096, 32 << 20)
        assert set(told) == {Info.EXPORT, Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE}
        assert bench.core.attached == {}
        assert set(client.infos(Option.INFO, "disk")) == {Info.EXPORT, Info.BLOCK_SIZE}
        client.go("disk")
        bench.core.wait_attached()


def test_unknown_name_says_so_and_goes_on(bench: Bench) -> None:
    with bench.connect() as client:
        client.greet()
        for option in (Option.INFO, Option.GO):
            with pytest.raises(Refused, match="there is no export named 'disc'") as caught:
                client.infos(option, "disc")
            assert caught.value.kind == Reply.ERR_UNKNOWN
        client.go("disk")


def test_empty_name_means_the_only_export(bench: Bench) -> None:
    with bench.connect() as client:
        with pytest.raises(Refused, match="name one of the exports") as caught:
            client.greet().go("")
        assert caught.value.kind == Reply.ERR_UNKNOWN
        del bench.exports.table["base"]
        assert client.infos(Option.INFO, "", (Info.NAME,))[Info.NAME] == b"disk"
        assert client.go("").size == GIB
    with bench.connect() as client:
        assert client.greet().export_name("").size == GIB
    bench.exports.table.clear()
    with bench.connect() as client, pytest.raises(Refused, match="nothing is exported"):
        client.greet().go("")


# ---- other options ----


def test_list(bench: Bench) -> None:
    with bench.connect() as client:
        *entries, last = client.greet().ask(Option.LIST)
        assert last.kind == Reply.ACK
        names = []
        for entry in entries:
            (length,) = struct.unpack_from(">I", entry.data)
            names.append(entry.data[4 : 4 + length].decode())
        assert names == ["disk", "base"]
        assert client.ask(Option.LIST, b"x")[-1].kind == Reply.ERR_INVALID


def test_list_of_very_many(bench: Bench) -> None:
    for number in range(5000):
        name = f"export-{number:05}"
        bench.exports.table[name] = NbdExport(name=name, size=GIB, read_only=False, core=bench.core)
    with bench.connect() as client:
        assert len(client.greet().ask(Option.LIST)) == 5003


def test_abort_is_acknowledged(bench: Bench) -> None:
    with bench.connect() as client:
        assert client.greet().ask(Option.ABORT)[-1].kind == Reply.ACK
        assert client.hung_up()


@pytest.mark.parametrize(
    "option",
    [
        Option.STARTTLS,
        0,
        4,
        4711,
        0xFFFFFFFF,
    ],
)
def test_unsupported_options_are_refused_and_the_handshake_goes_on(bench: Bench, option: int) -> None:
    with bench.connect() as client:
        assert client.greet().ask(option, b"data")[-1].kind == Reply.ERR_UNSUP
        assert client.go("disk").size == GIB


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 5,
        struct.pack(">I", 0xFFFFFFFF) + b"\0\0",
        struct.pack(">I", 4) + b"disk",
        struct.pack(">I4sH", 4, b"disk", 1),
        struct.pack(">I4sH", 4, b"disk", 0) + b"x",
        struct.pack(">I4sHH", 4, b"disk", 0, 0),
        struct.pack(">I2sH", 2, b"\xff\xfe", 0),
        export_request("x" * 4097),
    ],
)
def test_malformed_go_is_invalid(bench: Bench, data: bytes) -> None:
    with bench.connect() as client:
        assert client.greet().ask(Option.GO, data)[-1].kind == Reply.ERR_INVALID
        assert client.go("disk").size == GIB


@pytest.mark.parametrize("option", [Option.GO, Option.LIST, 99])
def test_too_big_option_is_skipped(bench: Bench, option: int) -> None:
    with bench.connect() as client:
        assert client.greet().ask(option, bytes(proto.MAX_OPTION + 1))[-1].kind == Reply.ERR_TOO_BIG
        assert client.go("disk").size == GIB


def test_largest_option_is_looked_at(bench: Bench) -> None:
    with bench.connect() as client:
        assert client.greet().ask(99, bytes(proto.MAX_OPTION))[-1].kind == Reply.ERR_UNSUP


def test_export_name_too_long_hangs_up(bench: Bench) -> None:
    for length in (4097, proto.MAX_OPTION + 1):
        with bench.connect() as client:
            client.greet().option(Option.EXPORT_NAME, b"x" * length)
            assert client.hung_up()


# ---- hostile clients ----


@pytest.mark.parametrize("flags", [4, 0x80000000, 0xFFFFFFFF])
def test_unknown_client_flags_hang_up(bench: Bench, flags: int) -> None:
    with bench.connect() as client:
        client.greet(flags)
        assert client.hung_up()


def test_wrong_magic_hangs_up(bench: Bench) -> None:
    with bench.connect() as client:
        client.greet().send(b"GET / HTTP/1.1\r\nHost: nbd\r\n\r\n")
        assert client.hung_up()


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Bench]:
    """A server whose deadline does not hide its other bounds."""
    made = Bench(tmp_path, HandshakeLimits(seconds=300))
    made.server.start()
    yield made
    made.close()


def test_huge_option_length_hangs_up_at_once(patient: Bench) -> None:
    with patient.connect() as client:
        client.greet().option(99, b"", length=0xFFFFFFFF)
        assert client.hung_up()


def test_bytes_of_a_handshake_are_bounded(patient: Bench) -> None:
    with patient.connect() as client:
        client.greet()
        for _ in range(proto.MAX_HANDSHAKE // proto.MAX_OPTION - 1):
            assert client.ask(99, bytes(proto.MAX_OPTION))[-1].kind == Reply.ERR_UNSUP
        client.option(99, b"", length=proto.MAX_OPTION)
        assert client.hung_up()


def test_options_of_a_handshake_are_bounded(patient: Bench) -> None:
    with patient.connect() as client:
        client.greet()
        flood = struct.pack(">QII", proto.IHAVEOPT, 99, 0) * (proto.MAX_OPTIONS + 1)
        sender = threading.Thread(target=_send_quietly, args=(client, flood))
        sender.start()
        assert client.hung_up()
        sender.join(20)


def _send_quietly(client: RawClient, data: bytes) -> None:
    with contextlib.suppress(OSError):
        client.send(data)


def test_deadline_ends_a_silent_client_and_others_do_not_wait(tmp_path: Path) -> None:
    bench = Bench(tmp_path, HandshakeLimits(seconds=5.0))
    bench.server.start()
    try:
        with bench.connect() as silent, bench.connect() as slow:
            silent.read(18)
            slow.greet().send(struct.pack(">QI", proto.IHAVEOPT, Option.GO))
            with bench.connect() as good:
                assert good.greet().go("disk").size == GIB
            assert silent.hung_up()
            assert slow.hung_up()
    finally:
        bench.close()


def test_a_client_that_never_reads_is_ended(tmp_path: Path) -> None:
    bench = Bench(tmp_path, HandshakeLimits(seconds=5.0))
    for number in range(3000):
        name = f"export-{number:05}" + "x" * 90
        bench.exports.table[name] = NbdExport(name=name, size=GIB, read_only=False, core=bench.core)
    bench.server.start()
    try:
        with bench.connect() as client:
            client.greet()
            for _ in range(50):
                client.option(Option.LIST)
            with bench.connect() as good:
                assert good.greet().go("disk").size == GIB
            wait_for(lambda: not bench.server._negotiating)
    finally:
        bench.close()


def test_the_oldest_gives_way_when_too_many_negotiate(tmp_path: Path) -> None:
    bench = Bench(tmp_path, HandshakeLimits(seconds=60, at_once=8))
    bench.server.start()
    idle: list[RawClient] = []
    try:
        for _ in range(20):
            client = bench.connect()
            client.read(18)
            idle.append(client)
            assert len(bench.server._negotiating) <= 9
        with bench.connect() as good:
            assert good.greet().go("disk").size == GIB
        assert idle[0].hung_up()
        idle[-1].send(struct.pack(">I", 3))
        assert idle[-1].go("disk").size == GIB
    finally:
        for client in idle:
            client.close()
        bench.close()


def test_a_storm_of_connections_leaks_nothing(bench: Bench) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for round_ in range(300):
            client = bench.connect()
            if round_ % 3:
                client.greet()
            client.close()
        wait_for(lambda: not bench.server._negotiating)
        gc.collect()
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)


# ---- a real client ----


@pytest.mark.skipif(shutil.which("nbdinfo") is None, reason="nbdinfo (libnbd-bin) is not installed")
def test_nbdinfo_lists(bench: Bench) -> None:
    uri = f"nbd+unix://?socket={bench.path}"
    done = subprocess.run(
        ["nbdinfo", "--json", "--list", uri], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    listed = {export["export-name"]: export for export in json.loads(done.stdout)["exports"]}
    assert set(listed) == {"disk", "base"}
    assert listed["base"]["is_read_only"] is True
    assert listed["disk"]["export-size"] == GIB
    assert listed["disk"]["can_fast_zero"] is True
    assert listed["disk"]["block_size_minimum"] == 512


# ---- anything at all ----


FRAGMENTS = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda option, data, lie: struct.pack(">QII", proto.IHAVEOPT, option, len(data) + lie) + data,
        st.integers(0, 12) | st.integers(0, 0xFFFFFFFF),
        st.binary(max_size=64) | st.sampled_from([b"disk", export_request("disk"), export_request("")]),
        st.sampled_from([0, 0, 0, 0, 1, 70000, 0xFFFF0000]),
    ),
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("fuzz"), HandshakeLimits(seconds=5.0))
    made.server.start()
    yield made
    made.close()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.binary(max_size=8) | st.sampled_from([b"\0\0\0\3", b"\0\0\0\1"]), rest=st.lists(FRAGMENTS))
def test_any_bytes_end_in_a_hang_up_or_an_attach(fuzzed: Bench, start: bytes, rest: list[bytes]) -> None:
    known = set(fuzzed.core.attached)
    with fuzzed.connect() as client:
        _send_quietly(client, start + b"".join(rest))
        with contextlib.suppress(OSError):
            client.socket.shutdown(socket.SHUT_WR)
        end = time.monotonic() + 20
        client.socket.settimeout(0.02)
        while set(fuzzed.core.attached) == known:
            assert time.monotonic() < end, "neither hung up nor attached"
            try:
                if not client.socket.recv(65536):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
    with fuzzed.connect() as good:
        assert good.greet().go("disk").size == GIB
