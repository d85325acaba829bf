"""The same life with ublk devices: needs a kernel with the driver, see vm-test."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_harness import Daemon, no_devices_left
from waiting import wait_for

pytest.importorskip("glidefs.core._core")

from glidefs.core.engine import Engine, EngineConfig
from glidefs.core.ublk import UblkConfig
from glidefs.core.volume import VolumeConfig
from glidefs.errors import DeviceError
from glidefs.transport.ublk import device as ublk
from glidefs.transport.ublk.device import DEAD, F_UPDATE_SIZE, LIVE, QUIESCED
from glidefs.transport.ublk.driver import ublk_missing

pytestmark = [
    pytest.mark.skipif(ublk_missing() is not None, reason=f"no ublk: {ublk_missing()}"),
    pytest.mark.root,
]

MIB = 1 << 20
Make = Callable[..., Daemon]


@contextlib.contextmanager
def direct(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        yield fd
    finally:
        os.close(fd)


def write(fd: int, offset: int, pattern: int, length: int = MIB) -> None:
    with mmap.mmap(-1, length) as buffer:
        buffer.write(bytes([pattern]) * length)
        assert os.pwritev(fd, [buffer], offset) == length


def holds(fd: int, offset: int, pattern: int, length: int = MIB) -> bool:
    with mmap.mmap(-1, length) as buffer:
        assert os.preadv(fd, [buffer], offset) == length
        return buffer[:] == bytes([pattern]) * length


def device_size(path: str) -> int:
    with open(path, "rb") as file:
        return file.seek(0, os.SEEK_END)


def dev_id(path: str) -> int:
    return int(path.removeprefix("/dev/ublkb"))


def wait_quiesced(path: str) -> None:
    """Until the kernel has noticed that the daemon is gone."""

    def quiesced() -> bool:
        found = ublk.query(dev_id(path))
        return found is not None and found.state == QUIESCED

    wait_for(quiesced, f"{path} waits for a server")


@pytest.fixture(autouse=True)
def _devices_are_removed() -> Iterator[None]:
    with no_devices_left():
        yield


def test_create_restart_crash_detach(daemon: Daemon) -> None:
    made = daemon.json("create", "v1", "--size", "64MiB")
    assert made["transport"] == "ublk"
    device = made["device"]
    assert device_size(device) == 64 * MIB
    with direct(device) as fd:
        write(fd, 0, 7)
        os.fsync(fd)
        write(fd, 5 * MIB, 8)
        # A planned stop: who has the device open notices nothing but a pause.
        daemon.stop()
        found = ublk.query(dev_id(device))
        assert found is not None
        assert found.state == QUIESCED
        results: list[bool] = []
        reader = threading.Thread(target=lambda: results.append(holds(fd, 0, 7)))
        reader.start()
        daemon.start()
        reader.join()
        assert results == [True]
        assert daemon.json("show", "v1")["device"] == device
        write(fd, 6 * MIB, 9)
        daemon.kill()
        daemon.start()
        assert daemon.json("show", "v1")["device"] == device
        for offset, pattern in ((0, 7), (5, 8), (6, 9), (7, 0)):
            assert holds(fd, offset * MIB, pattern), offset
    daemon.json("detach", "v1")
    assert not Path(device).exists()
    daemon.json("attach", "v1")
    with direct(daemon.json("show", "v1")["device"]) as fd:
        assert holds(fd, 6 * MIB, 9)
    daemon.json("remove", "v1")
    assert not Path(device).exists()


def test_writes_go_on_over_restarts(daemon: Daemon) -> None:
    device = daemon.json("create", "v1", "--size", "64MiB")["device"]
    stop = threading.Event()
    failures: list[str] = []
    rounds = [0]

    def writer() -> None:
        try:
            with direct(device) as fd:
                while not stop.is_set():
                    slot = rounds[0] % 64
                    write(fd, slot * MIB, 1 + rounds[0] % 250)
                    if not holds(fd, slot * MIB, 1 + rounds[0] % 250):
                        failures.append(f"round {rounds[0]}: other data")
                    rounds[0] += 1
        except OSError as error:
            failures.append(f"round {rounds[0]}: {error}")

    thread = threading.Thread(target=writer)
    thread.start()
    for end in (daemon.stop, daemon.kill, daemon.stop):
        mark = rounds[0]
        wait_for(lambda mark=mark: rounds[0] > mark + 3, "the writer goes on")
        end()
        daemon.start()
    mark = rounds[0]
    wait_for(lambda: rounds[0] > mark + 3, "the writer goes on")
    stop.set()
    thread.join()
    assert failures == []


def test_remove_on_stop(make_daemon: Make) -> None:
    daemon = make_daemon(extra='on_stop = "remove"').start()
    device = daemon.json("create", "v1", "--size", "64MiB")["device"]
    daemon.stop()
    assert not Path(device).exists()
    daemon.start()
    assert daemon.json("show", "v1")["device"] == device


def test_a_foreign_device_is_left_alone(daemon: Daemon, make_daemon: Make) -> None:
    first = daemon.json("create", "v1", "--size", "64MiB")["device"]
    other = make_daemon("b", node="node-2").start()
    second = other.json("create", "v2", "--size", "32MiB")["device"]
    assert first != second
    daemon.stop()
    record = daemon.base / "cache" / "exports" / "v1.json"
    from msgspec.structs import replace

    from glidefs.formats import export_record

    export_record.save(record, replace(export_record.load(record), device_id=dev_id(second)))
    daemon.start()
    assert daemon.json("show", "v1")["device"] != second
    assert device_size(second) == 32 * MIB
    found = ublk.query(dev_id(second))
    assert found is not None
    assert found.state == LIVE


def test_orphans_are_removed_and_no_others(daemon: Daemon, make_daemon: Make) -> None:
    """Without a daemon: the record of a device is gone; beside it are devices that are not ours to touch."""
    first = daemon.json("create", "v1", "--size", "64MiB")["device"]
    second = daemon.json("create", "v2", "--size", "64MiB")["device"]
    other = make_daemon("b", node="node-2").start()
    theirs = other.json("create", "v3", "--size", "32MiB")["device"]
    other.kill()
    assert "serves it" in daemon.fails("devices", "remove", str(dev_id(first)))
    daemon.kill()
    (daemon.base / "cache" / "exports" / "v1.json").unlink()
    wait_quiesced(first)
    found = {row["device"]: row for row in daemon.json("devices")}
    assert [found[path]["owner"] for path in (first, second, theirs)] == ["orphan", "export", "other"]
    assert [found[path]["export"] for path in (first, second)] == ["v1", "v2"]
    assert found[first]["size"] == 64 * MIB
    assert f"{first} (orphan: no export)" in daemon.run("doctor", check=False).stdout
    assert "of export v2" in daemon.fails("devices", "remove", str(dev_id(second)))
    assert "somebody else" in daemon.fails("devices", "remove", str(dev_id(theirs)))
    assert daemon.json("devices", "remove", str(dev_id(first)))["device"] == first
    assert not Path(first).exists()
    assert "no device" in daemon.fails("devices", "remove", str(dev_id(first)))
    # The others go on where they were.
    daemon.start()
    other.start()
    assert daemon.json("show", "v2")["device"] == second
    assert other.json("show", "v3")["device"] == theirs
    states = {row["device"]: row["state"] for row in daemon.json("devices", "list")}
    assert [states[path] for path in (second, theirs)] == ["served", "served"]


def test_an_orphan_is_not_left_by_an_export_that_failed(daemon: Daemon) -> None:
    """The daemon is back but cannot serve the export; its device waits until somebody removes the export."""
    device = daemon.json("create", "v1", "--size", "64MiB", "--wait")["device"]
    daemon.stop()
    for path in daemon.base.glob("cache/state/volumes/*/root"):
        path.unlink()
    for path in daemon.store.rglob("volumes/v1/manifest"):
        path.write_bytes(b"damaged")
    daemon.start()
    assert daemon.json("show", "v1")["state"] == "failed"
    assert Path(device).exists()
    shutil.rmtree(daemon.store / "default" / "volumes" / "v1")
    daemon.json("remove", "v1")
    assert not Path(device).exists()
    assert daemon.json("devices") == []


def test_an_orphan_that_is_open(daemon: Daemon) -> None:
    device = daemon.json("create", "v1", "--size", "64MiB")["device"]
    results: list[str] = []

    def read(fd: int) -> None:
        try:
            holds(fd, 0, 0)
            results.append("read")
        except OSError as error:
            results.append(os.strerror(error.errno or 0))

    with direct(device) as fd:
        daemon.kill()
        (daemon.base / "cache" / "exports" / "v1.json").unlink()
        wait_quiesced(device)
        reader = threading.Thread(target=read, args=(fd,))
        reader.start()
        note = daemon.json("devices", "remove", str(dev_id(device)))["note"]
        reader.join()
        assert results == ["Input/output error"]
        assert "when they close it" in note
    wait_for(lambda: ublk.query(dev_id(device)) is None, "the device is gone")


def test_an_id_that_is_taken(daemon: Daemon, make_daemon: Make) -> None:
    """Who tries to make a device with another's id must leave that one alone."""
    device = daemon.json("create", "v1", "--size", "64MiB")["device"]
    other = make_daemon("b", node="node-2")
    sizes = {"segment_bytes": MIB, "log_limit": 64 * MIB, "cache_bytes": 16 * MIB}
    limits = EngineConfig(cache_dir=other.base / "blocks", workers=1, **sizes)
    ids = {"volume_id": b"v" * 16, "log_id": b"l" * 16}
    with Engine(limits) as engine:
        core, _ = engine.open_volume(VolumeConfig(cookie=1, log_dir=other.base / "log", size=MIB, **ids))
        with core:
            for attempt in (core.start_ublk, core.add_ublk):
                with pytest.raises(DeviceError) as caught:
                    attempt(UblkConfig(dev_id=dev_id(device), tag=5))
                assert caught.value.errno == errno.EEXIST
            made = core.add_ublk(UblkConfig(tag=5))
            with pytest.raises(DeviceError):
                core.start_ublk(UblkConfig(dev_id=made, tag=6, added=True))
            found = ublk.query(made)
            assert found is not None
            assert found.state == DEAD
            ublk.ublk.delete(made, 5)
    with direct(device) as fd:
        assert holds(fd, 0, 0)


def test_resize(daemon: Daemon) -> None:
    device = daemon.json("create", "v1", "--size", "64MiB")["device"]
    grown = daemon.json("resize", "v1", "128MiB")
    if ublk.ublk.features() & F_UPDATE_SIZE:
        assert grown["note"] == ""
        assert device_size(device) == 128 * MIB
        daemon.json("resize", "v1", "32MiB", "--shrink")
        assert device_size(device) == 32 * MIB
        daemon.stop()
        daemon.start()
        assert device_size(device) == 32 * MIB
    else:
        assert "detach and attach" in grown["note"]
        assert device_size(device) == 64 * MIB
        assert "cannot shrink" in daemon.fails("resize", "v1", "32MiB", "--shrink")


def test_nbd_beside_ublk(daemon: Daemon) -> None:
    if shutil.which("qemu-io") is None:
        pytest.skip("qemu-io is not installed")
    made = daemon.json("create", "v1", "--size", "64MiB", "--transport", "nbd")
    assert made["device"].startswith("nbd+unix://")
    daemon.io("v1", "write -P 7 0 1M")
    report = daemon.run("doctor", "--json", check=False).stdout
    assert '"ublk driver"' in report


def test_doctor_names_orphans(daemon: Daemon) -> None:
    device = daemon.json("create", "v1", "--size", "64MiB")["device"]
    daemon.kill()
    text = daemon.run("doctor", check=False).stdout
    assert f"{device} (export v1)" in text
    daemon.start()
    assert f"{device} (export v1)" not in daemon.run("doctor", check=False).stdout
