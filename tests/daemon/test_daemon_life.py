"""Start, stop, crash, restart, lost disk: a real daemon on a file:// store with NBD."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable

import pytest
from daemon_harness import Daemon, servers
from waiting import DEADLINE, wait_for

from glidefs.api.client import CommandError, export_path

pytest.importorskip("glidefs.core._core")
pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")

Make = Callable[..., Daemon]


def test_sockets_are_private(daemon: Daemon) -> None:
    for name in ("api.sock", "nbd.sock"):
        assert stat.S_IMODE((daemon.base / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((daemon.base / "cache").stat().st_mode) == 0o700
    daemon.stop()
    assert not (daemon.base / "api.sock").exists()
    assert not (daemon.base / "nbd.sock").exists()


def test_restart_serves_the_same_exports(daemon: Daemon) -> None:
    daemon.json("create", "v1", "--size", "64MiB")
    daemon.json("create", "v2", "--size", "1GiB", "--flush", "store", "--prefix", "other", "--new-prefix")
    daemon.io("v1", "write -P 7 0 1M", "write -P 9 33M 64k", "flush")
    before = {e["name"]: e for e in daemon.json("list")}
    daemon.stop()
    daemon.start()
    after = {e["name"]: e for e in daemon.json("list")}
    for key in ("size", "device", "prefix", "flush", "volume_id", "log_id", "transport", "state"):
        assert {n: e[key] for n, e in before.items()} == {n: e[key] for n, e in after.items()}
    assert daemon.has("v1", 7, "0", "1M")
    assert daemon.has("v1", 9, "33M", "64k")
    assert daemon.has("v1", 0, "2M", "1M")


def test_crash_loses_nothing_acknowledged(daemon: Daemon) -> None:
    daemon.json("create", "v1", "--size", "64MiB")
    daemon.io("v1", "write -P 5 8M 1M")
    daemon.kill()
    daemon.start()
    assert daemon.has("v1", 5, "8M", "1M")


def test_sigterm_uploads_what_is_dirty(daemon: Daemon) -> None:
    daemon.json("create", "v1", "--size", "64MiB")
    daemon.io("v1", "write -P 5 0 4M")
    assert daemon.json("show", "v1")["volume"]["dirty_bytes"] > 0
    daemon.stop()
    daemon.json("export-image", "v1", "image")
    data = (daemon.base / "image").read_bytes()
    assert data[: 4 << 20] == b"\x05" * (4 << 20)
    assert len(data) == 64 << 20


def test_after_a_lost_disk_the_volumes_are_offered_and_taken_by_a_verb(daemon: Daemon) -> None:
    """! A name is no evidence: nothing is taken because a host of this name had it."""
    daemon.json("create", "v1", "--size", "64MiB")
    daemon.json("create", "gone", "--size", "64MiB")
    daemon.io("v1", "write -P 5 0 4M")
    daemon.json("drain", "v1")
    daemon.json("detach", "gone")
    bad = daemon.store / "default" / "volumes" / "aaa" / "manifest"
    bad.parent.mkdir()
    bad.write_bytes(b"not a manifest")
    daemon.kill()
    shutil.rmtree(daemon.base / "cache")
    daemon.start()
    wait_for(lambda: "attach --all --node node-1 --take-over" in daemon.log_text, "the offer")
    assert daemon.json("list") == []
    stored = {volume["name"]: volume for volume in daemon.json("list", "--store")}
    assert stored["v1"]["candidate"]
    assert not stored["gone"]["candidate"]
    assert "corrupt" in stored["aaa"]["damaged"]
    assert "its host" in daemon.fails("attach", "v1") or "take-over" in daemon.fails("attach", "v1")
    taken = daemon.json("attach", "--all", "--take-over")
    assert [export["name"] for export in taken["attached"]] == ["v1"]
    assert taken["failed"] == []
    assert daemon.has("v1", 5, "0", "4M")
    daemon.io("v1", "write -P 6 0 64k")
    daemon.json("drain", "v1")


def test_another_node_does_not_take_what_is_not_its_own(daemon: Daemon, make_daemon: Make) -> None:
    daemon.json("create", "v1", "--size", "64MiB", "--wait")
    other = make_daemon("b", node="node-2").start()
    assert other.json("list") == []
    assert "node-1" in other.fails("attach", "v1")


def test_second_daemon_is_refused(daemon: Daemon) -> None:
    assert daemon.process is not None
    done = daemon.run("run", check=False)
    assert done.returncode == 1
    assert f"in use by process {daemon.process.pid}" in done.stderr
    assert daemon.json("list") == []


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ('[cache]\ndir = "/proc/glidefs"', "[cache] dir /proc/glidefs"),
        ('[store]\nurl = "ftp://x"', "scheme"),
        ('[api]\nlisten = "127.0.0.1:0"\ntoken_file = "absent"', "[api] token_file"),
        ("[cache]\nlog_sise = 1", "did you mean 'log_size'"),
    ],
)
def test_a_bad_configuration_is_one_line(make_daemon: Make, section: str, said: str) -> None:
    daemon = make_daemon()
    head, body = section.split("\n", 1)
    key = body.partition("=")[0]
    lines = [line for line in daemon.config.read_text().splitlines() if not line.startswith(key)]
    daemon.config.write_text("\n".join(lines).replace(head, f"{head}\n{body}", 1))
    assert said in daemon.fails("run")


def test_a_file_in_place_of_the_cache_directory(make_daemon: Make) -> None:
    daemon = make_daemon()
    (daemon.base / "cache").write_text("")
    assert "it is not a directory" in daemon.fails("run")


def test_service_manager_is_told(make_daemon: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = make_daemon()
    path = str(daemon.base / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(DEADLINE)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        daemon.start()
        assert manager.recv(1000).startswith(b"READY=1")
        daemon.stop()
        assert manager.recv(1000).startswith(b"STOPPING=1")


def test_socket_files_of_a_crashed_daemon_are_replaced(daemon: Daemon) -> None:
    daemon.kill()
    assert (daemon.base / "api.sock").exists()
    daemon.start()
    assert daemon.json("list") == []


def test_the_socket_of_another_daemon_is_not(daemon: Daemon, make_daemon: Make) -> None:
    other = make_daemon("b")
    other.config.write_text(other.config.read_text().replace('"api.sock"', f'"{daemon.base}/api.sock"'))
    assert "another process listens there" in other.fails("run")
    assert daemon.json("list") == []


def test_tcp_needs_the_token(make_daemon: Make) -> None:
    port = servers.free_port()
    daemon = make_daemon()
    token = daemon.base / "token"
    token.write_text("0123456789abcdef\n")
    token.chmod(0o600)
    text = daemon.config.read_text()
    listen = f'[api]\nlisten = "127.0.0.1:{port}"\ntoken_file = "token"'
    daemon.config.write_text(text.replace("[api]", listen))
    daemon.start()

    def ask(**headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/api/exports", headers=headers)
        status = connection.getresponse().status
        connection.close()
        return status

    assert ask() == 401
    assert ask(Authorization="Bearer 0123456789abcdeX") == 401
    assert ask(Authorization="Basic 0123456789abcdef") == 401
    assert ask(Authorization="Bearer 0123456789abcdef") == 200
    assert daemon.json("list") == []
    assert "0123456789abcdef" not in daemon.log_text
    daemon.stop()
    token.chmod(0o644)
    assert "others can read it" in daemon.fails("run")


def test_interrupted_verbs_are_finished(daemon: Daemon) -> None:
    for name in ("gone", "kept"):
        daemon.json("create", name, "--size", "64MiB", "--wait")
        daemon.io(name, "write -P 5 0 1M")
    daemon.kill()
    exports = daemon.base / "cache" / "exports"
    (exports / "gone.intent").write_text("remove")
    (exports / "kept.intent").write_text("detach")  # which did not reach the store
    daemon.start()
    assert [(e["name"], e["state"]) for e in daemon.json("list")] == [("kept", "serving")]
    assert daemon.has("kept", 5, "0", "1M")
    assert daemon.volumes_in_store() == ["kept"]
    assert len(daemon.json("logs")) == 1
    record = (exports / "kept.json").read_bytes()
    daemon.json("detach", "kept")
    daemon.stop()
    (exports / "kept.json").write_bytes(record)
    (exports / "kept.intent").write_text("detach")  # which did
    daemon.start()
    assert daemon.json("list") == []
    assert not list(exports.glob("kept*"))


def test_kill_at_any_moment_of_create_and_remove(make_daemon: Make) -> None:
    """Whatever a crash leaves behind, the next start serves it or the verb can be repeated."""
    daemon = make_daemon().start()
    for round_ in range(6):
        name = f"v{round_}"
        stop = threading.Event()

        def churn(name: str = name, stop: threading.Event = stop) -> None:
            with contextlib.suppress(CommandError):
                while not stop.is_set():
                    daemon.client.call("PUT", export_path(name), {"size": "1MiB"})
                    daemon.client.call("DELETE", export_path(name))

        thread = threading.Thread(target=churn)
        thread.start()
        time.sleep(0.15 + 0.02 * round_)
        daemon.kill()
        stop.set()
        thread.join()
        daemon.start()
        for export in daemon.json("list"):
            assert export["state"] == "serving", (export, daemon.log_text)
        daemon.json("create", name, "--size", "1MiB")
        daemon.io(name, "write -P 1 0 4096")
        daemon.json("remove", name)
    assert daemon.json("list") == []
    assert daemon.json("logs") == []
    assert daemon.volumes_in_store() == []


def test_one_bad_record_does_not_stop_the_others(daemon: Daemon) -> None:
    daemon.json("create", "good", "--size", "64MiB")
    daemon.json("create", "bad", "--size", "64MiB")
    daemon.stop()
    record = daemon.base / "cache" / "exports" / "bad.json"
    record.write_text(record.read_text().replace('"size":', '"size" :'))
    daemon.start()
    states = {e["name"]: e for e in daemon.json("list")}
    assert states["good"]["state"] == "serving"
    assert states["bad"]["state"] == "failed"
    assert "checksum" in states["bad"]["reason"]


def test_an_outage_from_the_first_start_on(make_daemon: Make) -> None:
    """Create, write, crash and restart without a store; everything arrives when it comes."""
    port = servers.free_port()
    daemon = make_daemon()
    daemon.endpoint = f"http://127.0.0.1:{port}"
    daemon.write_config()
    daemon.start()
    assert daemon.json("create", "v1", "--size", "64MiB")["published"] is False
    daemon.io("v1", "write -P 5 0 1M", "flush")
    daemon.kill()
    began = time.monotonic()
    daemon.start()
    # What is here is served at once: the store, which was never seen, is not waited for.
    assert time.monotonic() - began < 12 * DEADLINE / 60
    assert daemon.has("v1", 5, "0", "1M")
    daemon.io("v1", "write -P 6 1M 1M", "flush")
    with servers.moto(port) as endpoint:
        servers.s3_client(endpoint).create_bucket(Bucket="bucket")
        wait_for(lambda: daemon.json("show", "v1")["published"], "the root is in the store")
        daemon.json("drain", "v1", "--timeout", "60s")
        daemon.json("export-image", "v1", "image")
        daemon.kill()
        daemon.start()
        assert daemon.has("v1", 6, "1M", "1M")
        daemon.stop()
    assert (daemon.base / "image").read_bytes()[: 2 << 20] == b"\x05" * (1 << 20) + b"\x06" * (1 << 20)


def test_a_stop_after_an_outage_uploads(daemon: Daemon) -> None:
    """Nobody asked the store since it came back: the stop must not go by what was known of it before."""
    daemon.json("create", "v1", "--size", "64MiB")
    away = daemon.store.with_name("unmounted")
    daemon.store.rename(away)
    daemon.io("v1", "write -P 5 0 1M", "flush")
    daemon.fails("drain", "v1", "--timeout", "3s")
    wait_for(lambda: "the store is away" in daemon.log_text, "the outage is noticed")
    away.rename(daemon.store)
    daemon.stop()
    assert "safe in the log" not in daemon.log_text
    daemon.json("export-image", "v1", "image")
    assert (daemon.base / "image").read_bytes()[: 1 << 20] == b"\x05" * (1 << 20)
