"""Who is who, as an operator meets it: disks not mounted, stores that are gone, hosts of one name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from daemon_harness import Daemon
from msgspec.structs import replace
from waiting import wait_for

from glidefs.daemon.identity import machine_id
from glidefs.formats import identity
from glidefs.formats.identity import HostIdentity

Make = Callable[..., Daemon]


def state(daemon: Daemon, name: str) -> str:
    return str(daemon.json("show", name)["state"])


def host_id(daemon: Daemon) -> str:
    record = json.loads((daemon.base / "cache" / "host.json").read_text())["record"]
    return str(record["host_id"])


def test_a_log_disk_that_is_not_mounted(make_daemon: Make, tmp_path: Path) -> None:
    """! Served from an empty log, flushed writes would be gone without a word."""
    disk = tmp_path / "logdisk"
    daemon = make_daemon(extra="")
    daemon.config.write_text(daemon.config.read_text().replace("[store]", f'log_dir = "{disk}"\n[store]', 1))
    daemon.start()
    daemon.json("create", "v1", "--size", "64MiB", "--transport", "nbd", "--wait")
    daemon.io("v1", "write -P 1 0 1M", "flush")
    daemon.kill()
    disk.rename(tmp_path / "away")
    disk.mkdir()
    daemon.start()
    assert state(daemon, "v1") == "failed"
    assert "mount the right disk" in daemon.json("show", "v1")["reason"]
    assert "its write log is not here" in daemon.fails("create", "v2", "--size", "64MiB")
    daemon.stop()
    assert not list(disk.glob("*/*"))
    shutil.rmtree(disk)
    (tmp_path / "away").rename(disk)
    daemon.start()
    assert daemon.has("v1", 1, "0", "1M")


def test_the_log_disk_of_another_host_is_refused(make_daemon: Make, tmp_path: Path) -> None:
    one, two = make_daemon("a").start(), make_daemon("b", node="node-2").start()
    two.json("create", "v2", "--size", "64MiB", "--transport", "nbd", "--wait")
    one.stop()
    two.stop()
    ours, theirs = one.base / "cache" / "logs", two.base / "cache" / "logs"
    ours.rename(tmp_path / "one")
    theirs.rename(ours)
    (tmp_path / "one").rename(theirs)
    two.start()
    assert state(two, "v2") == "failed"
    assert "another cache directory" in two.json("show", "v2")["reason"]


def test_a_store_that_is_not_mounted_fences_nothing(daemon: Daemon) -> None:
    """! An empty directory in the place of the store has no roots; that is not the store's word on them."""
    daemon.json("create", "v1", "--size", "64MiB", "--transport", "nbd")
    daemon.io("v1", "write -P 1 0 1M")
    daemon.json("drain", "v1")
    daemon.io("v1", "write -P 3 1M 1M", "flush")
    daemon.kill()
    daemon.store.rename(daemon.base / "unmounted")
    daemon.store.mkdir()
    daemon.start()
    assert daemon.has("v1", 3, "1M", "1M"), "what is resident is served"
    wait_for(lambda: "mount its disk" in daemon.log_text, "the line that says what is wrong")
    assert state(daemon, "v1") == "serving"
    assert "FENCED" not in daemon.log_text
    assert not list(daemon.store.iterdir()), "nothing was written into the mount point"
    daemon.store.rmdir()
    (daemon.base / "unmounted").rename(daemon.store)
    assert daemon.has("v1", 1, "0", "1M")
    daemon.json("drain", "v1")
    assert "FENCED" not in daemon.log_text


def test_a_daemon_does_not_make_a_store_by_itself(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon(store=tmp_path / "nowhere" / "store")
    shutil.rmtree(daemon.store)
    process = daemon.spawn()
    assert process.wait(30) == 1
    assert "--init-store" in daemon.log_text
    assert not daemon.store.exists()
    daemon.store.mkdir()
    daemon.start()
    assert [path.name for path in daemon.store.iterdir()] == [], "a start leaves an empty directory empty"
    daemon.json("create", "v1", "--size", "64MiB", "--transport", "nbd", "--wait")
    assert (daemon.store / "store.json").exists()


def test_two_hosts_of_one_name_run_side_by_side(make_daemon: Make) -> None:
    """! A golden image gives every host the same name: neither takes what the other has."""
    one, two = make_daemon("a").start(), make_daemon("b").start()
    assert host_id(one) != host_id(two)
    one.json("create", "v1", "--size", "64MiB", "--transport", "nbd", "--wait")
    one.io("v1", "write -P 1 0 1M", "flush")
    assert two.json("list") == []
    assert "take-over" in two.fails("attach", "v1")
    two.json("create", "v2", "--size", "64MiB", "--transport", "nbd", "--wait")
    one.json("drain", "v1")
    for daemon, name in ((one, "v1"), (two, "v2")):
        assert [export["name"] for export in daemon.json("list")] == [name]
        assert state(daemon, name) == "serving"


def test_a_damaged_identity_comes_back_from_its_copies(daemon: Daemon) -> None:
    daemon.json("create", "v1", "--size", "64MiB", "--transport", "nbd", "--wait")
    daemon.io("v1", "write -P 1 0 1M", "flush")
    mine, path = host_id(daemon), daemon.base / "cache" / "host.json"
    daemon.kill()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    daemon.start()
    assert host_id(daemon) == mine
    assert "host.json" in daemon.log_text
    assert daemon.has("v1", 1, "0", "1M")
    daemon.json("drain", "v1")


def test_a_cache_directory_of_another_machine_is_named(daemon: Daemon) -> None:
    def line() -> dict[str, str]:
        found = json.loads(daemon.run("doctor", "--json", check=False).stdout)["checks"]
        return next(check for check in found if check["check"] == "cache directory's machine")

    assert line()["state"] == "ok"
    path = daemon.base / "cache" / "host.json"
    host = identity.decode(str(path), path.read_bytes(), HostIdentity)
    path.write_bytes(identity.encode(replace(host, machine="0" * 32)))
    assert line()["state"] == ("warn" if machine_id() else "ok")
    if machine_id():
        assert line()["detail"] == "this cache directory was made on another machine"
        assert "if that machine still runs with a copy of it" in line()["remedy"]
    path.write_bytes(identity.encode(replace(host, machine="")))  # where there was no machine id
    assert line()["state"] == "ok"
