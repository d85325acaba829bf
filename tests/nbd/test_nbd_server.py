"""Connections, listeners and the end of both, against a core that only keeps the sockets."""

from __future__ import annotations

import contextlib
import grp
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from nbd_client import RawClient, export_request
from nbd_fakes import GIB, Bench, Exports, FakeCore
from waiting import wait_for

from glidefs.config import NbdSettings
from glidefs.errors import GlideError
from glidefs.transport.nbd.listen import ListenError, activated_listeners
from glidefs.transport.nbd.negotiation import NbdExport
from glidefs.transport.nbd.proto import Option
from glidefs.transport.nbd.server import NbdServer

# ---- exports that go away, cores that refuse ----


def test_export_removed_while_its_client_connects(bench: Bench) -> None:
    original = bench.exports.nbd_export
    seen: list[str] = []

    def once(name: str) -> NbdExport | None:
        seen.append(name)
        return original(name) if len(seen) == 1 else None

    bench.exports.nbd_export = once  # type: ignore[method-assign]
    with bench.connect() as client:
        client.greet().go("disk")
        assert client.hung_up()
    assert bench.server.connections() == []
    assert bench.core.attached == {}


def test_removal_between_the_lookup_and_the_record(bench: Bench) -> None:
    """The attach must look again, or the connection would outlive its export."""
    original = bench.exports.nbd_export
    seen: list[str] = []

    def removed_behind(name: str) -> NbdExport | None:
        found = original(name)
        seen.append(name)
        if len(seen) == 2:
            del bench.exports.table[name]
            bench.server.close_export(name)
        return found

    bench.exports.nbd_export = removed_behind  # type: ignore[method-assign]
    with bench.connect() as client:
        client.greet().go("disk")
        assert client.hung_up()
    assert bench.server.connections() == []
    assert bench.core.attached == {}


def test_export_replaced_while_its_client_connects(bench: Bench) -> None:
    original = bench.exports.nbd_export
    seen: list[str] = []

    def replaced(name: str) -> NbdExport | None:
        seen.append(name)
        larger = NbdExport(name="disk", size=2 * GIB, read_only=False, core=bench.core)
        return original(name) if len(seen) == 1 else larger

    bench.exports.nbd_export = replaced  # type: ignore[method-assign]
    with bench.connect() as client:
        assert client.greet().go("disk").size == GIB
        assert client.hung_up()
    assert bench.core.attached == {}


def test_core_that_refuses_ends_the_connection(bench: Bench) -> None:
    bench.core.fail = GlideError("closed")
    with bench.connect() as client:
        client.greet().go("disk")
        assert client.hung_up()
    wait_for(lambda: not bench.server.connections())


def test_a_broken_lookup_harms_one_client_only(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    original = bench.exports.nbd_export

    def broken(name: str) -> NbdExport | None:
        raise RuntimeError("lookup")

    bench.exports.nbd_export = broken  # type: ignore[method-assign]
    with bench.connect() as client:
        client.greet().option(Option.GO, export_request("disk"))
        assert client.hung_up()
    bench.exports.nbd_export = original  # type: ignore[method-assign]
    with bench.connect() as client:
        client.greet().go("disk")
    assert "NBD handshake with" in caplog.text
    caplog.clear()


def test_close_export_ends_its_connections_only(bench: Bench) -> None:
    with bench.connect() as first, bench.connect() as second, bench.connect() as other:
        for client, name in ((first, "disk"), (second, "disk"), (other, "base")):
            client.greet().go(name)
        bench.core.wait_attached(3)
        wait_for(lambda: len(bench.server.connections("disk")) == 2)
        del bench.exports.table["disk"]
        bench.server.close_export("disk")
        assert first.hung_up()
        assert second.hung_up()
        assert [about.export for about in bench.server.connections()] == ["base"]
        assert len(bench.core.detached) == 2
        bench.server.close_export("disk")


def test_close_export_waits_for_an_attach_under_way(bench: Bench) -> None:
    bench.core.gate = threading.Event()
    with bench.connect() as client:
        client.greet().go("disk")
        assert bench.core.entered.wait(20)
        del bench.exports.table["disk"]
        closer = threading.Thread(target=bench.server.close_export, args=("disk",))
        closer.start()
        closer.join(0.2)
        assert closer.is_alive()
        bench.core.gate.set()
        closer.join(20)
        assert not closer.is_alive()
        assert client.hung_up()
        assert bench.server.connections() == []


def test_connection_that_ends_before_attach_returns(bench: Bench) -> None:
    bench.core.gate = threading.Event()
    with bench.connect() as client:
        client.greet().go("disk")
        assert bench.core.entered.wait(20)
        (about,) = bench.server.connections()
        bench.server.connection_closed(about.conn_id, 0)
        bench.core.gate.set()
        bench.core.wait_attached()
        bench.server.close_export("disk")
        assert bench.server.connections() == []


# ---- listeners ----


def test_out_of_descriptors_is_waited_out(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = socket.socket(socket.AF_UNIX)
    filler: list[int] = []
    try:
        with socket.socket() as highest:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno() + 1, hard))
            with contextlib.suppress(OSError):
                while True:
                    filler.append(os.dup(waiting.fileno()))
            waiting.connect(bench.path)
            wait_for(lambda: "cannot accept NBD connections" in caplog.text)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in filler:
            os.close(fd)
    with RawClient(waiting) as client:
        assert client.greet().go("disk").size == GIB
    assert len(caplog.records) == 1
    caplog.clear()


def test_socket_mode_group_and_directory(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "nbd.sock"
    server = NbdServer(NbdSettings(socket=str(path)), Exports())
    server.start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    server.close()
    server.close()
    assert not path.exists()
    group = grp.getgrgid(os.getgid()).gr_name
    with NbdServer(NbdSettings(socket=str(path), socket_group=group), Exports()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert path.stat().st_gid == os.getgid()
    with pytest.raises(ListenError, match="there is no group"):
        NbdServer(NbdSettings(socket=str(path), socket_group="no-such-group"), Exports()).start()


def test_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "nbd.sock")
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(path)
    dead.close()
    with NbdServer(NbdSettings(socket=path), Exports()) as first:
        with pytest.raises(ListenError, match="another process listens"):
            NbdServer(NbdSettings(socket=path), Exports()).start()
        with RawClient(path) as client:
            client.greet()
        os.unlink(path)
        with NbdServer(NbdSettings(socket=path), Exports()):
            first.close()
            assert os.path.exists(path), "the first server removed the socket of the second"


def test_a_file_in_the_way_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    path.write_text("precious")
    with pytest.raises(ListenError, match="is not a socket"):
        NbdServer(NbdSettings(socket=str(path)), Exports()).start()
    assert path.read_text() == "precious"
    with pytest.raises(ListenError, match="at most 107 bytes"):
        NbdServer(NbdSettings(socket=str(tmp_path / ("x" * 120))), Exports()).start()


def test_tcp_listener(tmp_path: Path) -> None:
    core = FakeCore()
    disk = NbdExport(name="disk", size=GIB, read_only=False, core=core)
    path = str(tmp_path / "nbd.sock")
    with NbdServer(NbdSettings(socket=path, listen="127.0.0.1:0"), Exports(disk)) as server:
        address = server.listeners[1].getsockname()
        with RawClient(address) as client:
            assert client.greet().go("disk").size == GIB
            (conn_id,) = core.wait_attached()
            mine = core.attached[conn_id][0]
            assert mine.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert mine.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert server.connections()[0].peer.startswith("127.0.0.1:")
        with pytest.raises(ListenError, match="cannot listen"):
            NbdServer(NbdSettings(socket=path + "2", listen=f"127.0.0.1:{address[1]}"), Exports()).start()
        assert not os.path.exists(path + "2")
        core.close()


def test_given_listeners_replace_the_configured_ones(tmp_path: Path) -> None:
    unused, path = str(tmp_path / "unused.sock"), str(tmp_path / "given.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    with pytest.raises(ListenError, match="not a listening socket"):
        NbdServer(NbdSettings(socket=unused), Exports(), listeners=[listener])
    listener.listen()
    core = FakeCore()
    disk = NbdExport(name="disk", size=GIB, read_only=False, core=core)
    with NbdServer(NbdSettings(socket=unused), Exports(disk), listeners=[listener]) as server:
        assert server.uri("disk") == f"nbd+unix:///disk?socket={path}"
        with RawClient(path) as client:
            assert client.greet().go("disk").size == GIB
    assert os.path.exists(path)
    assert not os.path.exists(unused)
    core.close()


def test_uri_is_quoted_and_known_before_start(tmp_path: Path) -> None:
    path = str(tmp_path / "a b&c.sock")
    server = NbdServer(NbdSettings(socket=path), Exports())
    expected = f"nbd+unix:///x%2Fy?socket={tmp_path}/a%20b%26c.sock"
    assert server.uri("x/y") == expected
    with server:
        assert server.uri("x/y") == expected


def test_handed_over_listener_goes_on_with_its_successor(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.server.start()
    with bench.connect() as client:
        client.greet().go("disk")
        bench.core.wait_attached()
        successor = NbdServer(
            NbdSettings(), bench.exports, listeners=[each.dup() for each in bench.server.listeners]
        )
        bench.server.close(handed_over=True)
        assert bench.core.detached == []
        early = bench.connect()
        with successor:
            assert early.greet().go("base").size == 2 * GIB
            early.close()
    bench.core.close()


def test_activated_listeners() -> None:
    code = """
import os, sys
from glidefs.transport.nbd.listen import activated_listeners
environ = {**os.environ, "LISTEN_PID": str(os.getpid())}
found = activated_listeners("nbd", environ)
print([each.getsockname() for each in found])
print([os.get_inheritable(3)])
print(activated_listeners("nbd", {**environ, "LISTEN_PID": "1"}))
print(activated_listeners("nbd", {**environ, "LISTEN_FDS": "x"}))
"""
    with socket.socket() as mine, socket.socket() as other:
        for each in (mine, other):
            each.bind(("127.0.0.1", 0))
            each.listen()
        pair = [os.dup(mine.fileno()), os.dup(other.fileno())]

        def place() -> None:
            high = [os.dup2(fd, 100 + index) for index, fd in enumerate(pair)]
            for index, fd in enumerate(high):
                os.dup2(fd, 3 + index, inheritable=True)

        environ = {**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "nbd:api"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environ,
            preexec_fn=place,
            close_fds=False,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout.splitlines() == [f"[{mine.getsockname()}]", "[False]", "[]", "[]"]
        for fd in pair:
            os.close(fd)
    assert activated_listeners("nbd", {}) == []
