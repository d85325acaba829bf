"""Every verb through the command line: shapes, errors, idempotence, attacks on names and sizes."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable

import pytest
from daemon_harness import Daemon
from mutate import bit_flip
from waiting import wait_for

from glidefs.api.client import CommandError, export_path

pytest.importorskip("glidefs.core._core")
pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")

Make = Callable[..., Daemon]
MIB = 1 << 20


def test_create_and_show_say_where(daemon: Daemon) -> None:
    made = daemon.json("create", "v1", "--size", "64MiB")
    assert made["name"] == "v1"
    assert made["size"] == 64 * MIB
    assert made["transport"] == "nbd"
    assert made["device"].startswith("nbd+unix:///v1?socket=")
    assert made["created"] is True
    shown = daemon.json("show", "v1")
    assert {key: shown[key] for key in ("name", "size", "transport", "device")} == {
        key: made[key] for key in ("name", "size", "transport", "device")
    }
    for key in ("dirty_bytes", "oldest_dirty_seconds", "connections", "fenced"):
        assert key in shown["volume"]
    again = daemon.json("create", "v1", "--size", "64MiB")
    assert again["created"] is False
    assert again["volume_id"] == made["volume_id"]
    assert "other settings" in daemon.fails("create", "v1", "--size", "65MiB")
    assert [e["name"] for e in daemon.json("list")] == ["v1"]
    for line in (daemon.run("list").stdout, daemon.run("show", "v1").stdout):
        assert "v1" in line
    # A store that takes two seconds, as a disk may once, is not waited for.
    more = (daemon.json("create", name, "--size", "64MiB") for name in ("v2", "v3"))
    assert made["published"] or any(each["published"] for each in more)


def test_sizes(daemon: Daemon) -> None:
    assert daemon.json("create", "tiny", "--size", "1")["size"] == 4096
    assert daemon.json("create", "huge", "--size", "1EiB")["size"] == 1 << 60
    assert daemon.json("create", "odd", "--size", "1000000")["size"] == 1003520
    for size in ("0", "-1", "-10GiB", str(1 << 63), str((1 << 60) + 1), "x", "", "1e400", "nan", "9" * 60):
        line = daemon.fails("create", "bad", f"--size={size}")
        assert "size" in line, size
    assert "bad" not in [e["name"] for e in daemon.json("list")]
    daemon.io("tiny", "write -P 3 0 4096", "read -P 3 0 4096")
    daemon.io("huge", "write -P 3 1152921504606842880 4096", "read -P 3 1152921504606842880 4096")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        "-x",
        ".hidden",
        "a b",
        "a\nb",
        "é",
        "x" * 129,
        "a%2fb",
        "a\x01",
    ],
)
def test_names(daemon: Daemon, name: str) -> None:
    before = sorted(p.relative_to(daemon.base) for p in daemon.base.rglob("*"))
    for verb, path in (("PUT", ""), ("GET", ""), ("DELETE", ""), ("POST", "/attach"), ("POST", "/detach")):
        body = {"size": "1GiB"} if verb == "PUT" else {}
        with pytest.raises(CommandError) as caught:
            daemon.client.call(verb, export_path(name) + path, body)
        assert caught.value.status in (400, 404, 405), (verb, name, caught.value)
    assert sorted(p.relative_to(daemon.base) for p in daemon.base.rglob("*")) == before


def test_a_name_of_128_characters(daemon: Daemon) -> None:
    name = "x" * 128
    daemon.json("create", name, "--size", "1MiB")
    daemon.stop()
    daemon.start()
    assert daemon.json("show", name)["state"] == "serving"


def test_bad_bodies(daemon: Daemon) -> None:
    for body in (
        {},
        {"size": None},
        {"size": []},
        {"size": 1.5},
        {"size": "1GiB", "extra": 1},
        {"size": "1GiB", "transport": "scsi"},
        {"size": "1GiB", "flush": "never"},
        {"size": "1GiB", "prefix": "../x"},
        {"size": 4096, "wait": "yes"},
    ):
        with pytest.raises(CommandError) as caught:
            daemon.client.call("PUT", "/api/exports/v1", body)
        assert caught.value.status == 400, body
        assert caught.value.reason
    with pytest.raises(CommandError) as caught:
        daemon.client.call("PUT", "/api/exports/v1", {"size": "x" * 100_000})
    assert caught.value.status == 413
    with pytest.raises(CommandError) as caught:
        daemon.client.call("GET", "/api/nothing")
    assert caught.value.status == 404
    assert daemon.json("list") == []


def test_resize(daemon: Daemon) -> None:
    daemon.json("create", "v1", "--size", "64MiB")
    daemon.io("v1", "write -P 7 63M 1M")
    assert daemon.json("resize", "v1", "128MiB")["size"] == 128 * MIB
    assert daemon.has("v1", 7, "63M", "1M")
    assert daemon.has("v1", 0, "64M", "64M")
    daemon.io("v1", "write -P 8 127M 1M")
    assert "--shrink" in daemon.fails("resize", "v1", "32MiB")
    assert daemon.json("resize", "v1", "32MiB", "--shrink")["size"] == 32 * MIB
    assert daemon.json("resize", "v1", "32MiB")["size"] == 32 * MIB
    daemon.json("resize", "v1", "128MiB")
    assert daemon.has("v1", 0, "32M", "96M")
    daemon.stop()
    daemon.start()
    assert daemon.json("show", "v1")["size"] == 128 * MIB
    assert daemon.has("v1", 0, "32M", "96M")


def test_detach_and_attach_elsewhere(daemon: Daemon, make_daemon: Make) -> None:
    daemon.json("create", "v1", "--size", "64MiB")
    daemon.io("v1", "write -P 5 3M 2M")
    assert daemon.json("detach", "v1")["detached"] is True
    assert daemon.json("list") == []
    assert list((daemon.base / "cache" / "exports").glob("*.json")) == []
    assert list((daemon.base / "cache" / "logs").glob("*/*")) == []
    assert "no such export" in daemon.fails("detach", "v1")
    other = make_daemon("b", node="node-2").start()
    attached = other.json("attach", "v1")
    assert attached["state"] == "serving"
    assert attached["size"] == 64 * MIB
    assert other.json("attach", "v1")["log_id"] == attached["log_id"]
    assert other.has("v1", 5, "3M", "2M")
    assert "node-2" in daemon.fails("attach", "v1")


def test_take_over_fences_the_first(daemon: Daemon, make_daemon: Make) -> None:
    daemon.json("create", "v1", "--size", "64MiB")
    daemon.io("v1", "write -P 5 0 1M")
    daemon.json("drain", "v1")
    daemon.io("v1", "write -P 6 0 1M")
    other = make_daemon("b", node="node-2").start()
    other.json("attach", "v1", "--take-over")
    assert other.has("v1", 5, "0", "1M")
    assert "fenced" in daemon.fails("drain", "v1")
    shown = daemon.json("show", "v1")
    assert shown["state"] == "fenced"
    assert "node-2" in shown["reason"]
    assert daemon.client.call("GET", "/health")["exports"]["fenced"] == 1
    assert "fenced" in daemon.run("list").stdout
    assert [(entry["export"], entry["state"]) for entry in daemon.json("logs")] == [("v1", "fenced")]
    assert "detach v1 first" in daemon.fails("logs", "delete", shown["volume_id"], shown["log_id"])
    detached = daemon.json("detach", "v1")
    assert "set aside" in detached["note"]
    aside = daemon.json("logs")
    assert [entry["state"] for entry in aside] == ["set aside"]
    assert aside[0]["log_id"] == shown["log_id"]
    ids = aside[0]["volume_id"], aside[0]["log_id"]
    daemon.json("logs", "export", *ids, "aside.img")
    assert (daemon.base / "aside.img").read_bytes()[:4096] == b"\x06" * 4096
    segment = max((daemon.base / "cache" / "logs").glob("*/*/*.seg"))
    bit_flip(segment, segment.stat().st_size - 1)
    assert "--partial" in daemon.fails("logs", "export", *ids, "damaged.img")
    assert not (daemon.base / "damaged.img").exists()
    saved = daemon.run("logs", "export", *ids, "damaged.img", "--partial")
    assert "0 bytes" not in saved.stderr
    assert f"{segment} has 1 bad records that were synced: lost are " in saved.stderr
    bit_flip(segment, segment.stat().st_size - 1)
    assert "the store does not have 1048576 bytes of it" in daemon.fails("logs", "delete", *ids)
    assert "1048576 bytes" in daemon.json("logs", "delete", *ids, "--force")["note"]
    assert daemon.json("logs", "list") == []
    assert "no such log" in daemon.fails("logs", "delete", *ids)
    assert other.has("v1", 5, "0", "1M")


@pytest.mark.parametrize("dirty", [True, False])
def test_detach_of_a_volume_that_another_host_took(dirty: bool, daemon: Daemon, make_daemon: Make) -> None:
    """This host hears of it from the detach itself, and the volume stays the other's."""
    daemon.json("create", "v1", "--size", "64MiB")
    daemon.io("v1", "write -P 5 0 1M")
    daemon.json("drain", "v1")
    if dirty:
        daemon.io("v1", "write -P 6 0 1M")
    other = make_daemon("b", node="node-2").start()
    other.json("attach", "v1", "--take-over")
    assert daemon.json("show", "v1")["state"] == "serving"
    assert "set aside" in daemon.json("detach", "v1")["note"]
    assert daemon.json("list") == []
    assert [entry["state"] for entry in daemon.json("logs")] == ["set aside"]
    assert other.has("v1", 5, "0", "1M")
    other.json("drain", "v1")
    daemon.stop()
    daemon.start()
    assert daemon.json("list") == []


def test_remove_of_a_fenced_export_keeps_the_log_and_the_other_host_s_volume(
    daemon: Daemon, make_daemon: Make
) -> None:
    daemon.json("create", "v1", "--size", "64MiB", "--wait")
    daemon.io("v1", "write -P 6 0 1M")
    other = make_daemon("b", node="node-2").start()
    other.json("attach", "v1", "--take-over")
    assert "another host" in daemon.json("remove", "v1")["note"]
    assert [entry["state"] for entry in daemon.json("logs")] == ["set aside"]
    other.io("v1", "write -P 7 0 1M")
    other.json("drain", "v1")


def test_logs_in_use_are_not_deleted(daemon: Daemon) -> None:
    made = daemon.json("create", "v1", "--size", "64MiB")
    daemon.io("v1", "write -P 5 0 1M")
    segment = max((daemon.base / "cache" / "logs").glob("*/*/*.seg"))
    shown = daemon.json("inspect", str(segment))
    assert (shown["volume_id"], shown["log_id"]) == (made["volume_id"], made["log_id"])
    assert shown["written_bytes"] == MIB
    listed = daemon.json("logs")
    assert [(e["export"], e["state"]) for e in listed] == [("v1", "in use")]
    assert "served" in daemon.fails("logs", "delete", made["volume_id"], made["log_id"])
    assert "invalid" in daemon.fails("logs", "delete", "..", "..")
    assert daemon.has("v1", 5, "0", "1M")


def test_remove(daemon: Daemon) -> None:
    daemon.json("create", "v1", "--size", "64MiB", "--wait")
    daemon.io("v1", "write -P 5 0 1M")
    assert daemon.json("remove", "v1")["removed"] is True
    assert daemon.json("list") == []
    (root,) = daemon.store.rglob("manifest")
    assert daemon.json("inspect", str(root))["removed_at"]
    assert list((daemon.base / "cache" / "logs").glob("*/*")) == []
    assert "has a volume of that name" in daemon.fails("remove", "v1")
    daemon.json("create", "v1", "--size", "64MiB")
    assert daemon.has("v1", 0, "0", "1M")


@pytest.mark.parametrize("verb", ["detach", "remove"])
def test_an_export_that_a_client_has_open_stays(daemon: Daemon, verb: str) -> None:
    uri = daemon.json("create", "v1", "--size", "8MiB", "--transport", "nbd")["device"]
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", uri], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as client:
        wait_for(lambda: daemon.json("show", "v1")["volume"]["connections"], "the client is there")
        said = daemon.fails(verb, "v1")
        assert "v1: 1 NBD client is connected" in said
        assert "--force" in said
        assert daemon.json("show", "v1")["state"] == "serving"
        assert "was cut off" in daemon.json(verb, "v1", "--force")["note"]
        client.communicate(b"")
    daemon.json("create", "v2", "--size", "8MiB", "--transport", "nbd")
    daemon.io("v2", "write 0 64k")
    daemon.json(verb, "v2")  # who has gone is not waited for


def test_a_removed_volume_comes_back(daemon: Daemon) -> None:
    daemon.json("create", "v1", "--size", "8MiB", "--transport", "nbd", "--wait")
    before = daemon.json("show", "v1")["volume_id"]
    removed = daemon.json("remove", "v1")
    assert removed["restorable_until"] > time.time() + 3600
    assert "glidefs undelete v1" in removed["note"]
    assert daemon.json("undelete", "v1")["size"] == 8 << 20
    assert "was not removed" in daemon.fails("undelete", "v1")
    daemon.json("attach", "v1")
    assert daemon.json("show", "v1")["volume_id"] == before
    daemon.json("remove", "v1", "--now", "--purge")
    assert "was removed" in daemon.fails("attach", "v1"), "it has had two owners"
    daemon.json("create", "v2", "--size", "8MiB", "--transport", "nbd", "--wait")
    daemon.json("remove", "v2", "--now")
    assert "no volume of that name" in daemon.fails("undelete", "v2")


def test_remove_of_what_nobody_serves(daemon: Daemon, make_daemon: Make) -> None:
    daemon.json("create", "v1", "--size", "64MiB", "--wait")
    other = make_daemon("b", node="node-2").start()
    assert "node-1" in other.fails("remove", "v1")
    daemon.json("detach", "v1")
    assert other.json("remove", "v1", "--now")["removed"] is True
    assert not list(daemon.store.rglob("manifest"))


def test_name_taken_in_the_store(daemon: Daemon, make_daemon: Make) -> None:
    daemon.json("create", "v1", "--size", "64MiB", "--wait")
    other = make_daemon("b", node="node-2").start()
    line = other.fails("create", "v1", "--size", "64MiB")
    assert "node-1" in line
    assert other.json("list") == []
    assert list((other.base / "cache" / "exports").glob("*.json")) == []
    assert daemon.json("show", "v1")["volume"]["fenced"] == ""


def test_read_only(daemon: Daemon) -> None:
    daemon.json("create", "v1", "--size", "1MiB", "--read-only")
    assert daemon.json("show", "v1")["read_only"] is True
    with pytest.raises(AssertionError):
        daemon.io("v1", "write -P 1 0 4096")


def test_ublk_that_is_not_there_is_a_clear_error(daemon: Daemon) -> None:
    from glidefs.transport.ublk.driver import UBLK_CONTROL

    if UBLK_CONTROL.exists():
        pytest.skip("this kernel has ublk")
    line = daemon.fails("create", "v1", "--size", "1MiB", "--transport", "ublk")
    assert "ublk" in line
    assert "--transport nbd" in line
    assert daemon.json("list") == []


def test_errors_are_json_too(daemon: Daemon) -> None:
    done = daemon.run("show", "absent", "--json", check=False)
    assert done.returncode == 1
    assert set(json.loads(done.stdout)) == {"error", "hint"}


def test_no_daemon(make_daemon: Make) -> None:
    daemon = make_daemon()
    assert "glidefs run" in daemon.fails("list")


def test_metrics_and_health(daemon: Daemon) -> None:
    daemon.json("create", "v1", "--size", "64MiB")
    daemon.io("v1", "write -P 5 0 1M", "flush", "read 0 1M")
    assert daemon.total("glidefs_dirty_bytes", export="v1") >= MIB
    assert daemon.total("glidefs_operations_total", op="write") >= 1
    assert daemon.total("glidefs_operations_total", op="flush") >= 1
    assert daemon.samples("glidefs_store_requests_total")
    assert daemon.total("glidefs_process_resident_memory_bytes") < 256 * MIB
    health = daemon.client.call("GET", "/health")
    assert health["ready"] is True
    assert health["exports"]["serving"] == 1


def test_doctor(daemon: Daemon) -> None:
    done = daemon.run("doctor", "--json", check=False)
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    checks = {check["check"]: check for check in report["checks"]}
    assert checks["store"]["state"] == "ok"
    assert checks["daemon"]["state"] == "ok"
    assert all(check["state"] in ("ok", "warn", "fail") for check in checks.values())


def test_doctor_says_what_to_do(make_daemon: Make) -> None:
    daemon = make_daemon()
    daemon.store.rmdir()
    daemon.store.write_text("not a directory")
    report = json.loads(daemon.run("doctor", "--json", check=False).stdout)
    checks = {check["check"]: check for check in report["checks"]}
    assert report["ok"] is False
    assert checks["store"]["state"] == "fail"
    assert checks["daemon"]["state"] == "warn"
    assert "glidefs run" in checks["daemon"]["remedy"]
