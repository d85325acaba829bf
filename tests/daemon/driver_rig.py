"""Hosts with ublk devices, over a driver that is a dictionary."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from glidefs.config import CacheSettings, Config, UblkSettings
from glidefs.core.ublk import ANY_DEVICE, UblkConfig, UblkInfo
from glidefs.doctor import devices
from glidefs.errors import DeviceError
from glidefs.formats import export_record
from glidefs.formats.export_record import ExportRecord
from glidefs.transport.base import Attachment
from glidefs.transport.device.names import DeviceNames
from glidefs.transport.ublk import device as ublk
from glidefs.transport.ublk.device import DEAD, F_USER_RECOVERY, FAIL_IO, LIVE, QUIESCED, UblkTransport

NOBODY = 4_000_000
"""No process has this id."""


class Driver:
    """What the kernel would know. ``events`` are the calls that changed something."""

    def __init__(self) -> None:
        self.devices: dict[int, UblkInfo] = {}
        self.events: list[str] = []
        self.held = False
        """Whether somebody has every device open."""
        self.draining: set[int] = set()
        """Deleted, but open: the number is theirs."""

    def put(self, dev_id: int, tag: int, state: int, pid: int = 0) -> None:
        self.devices[dev_id] = UblkInfo(
            dev_id=dev_id,
            queues=1,
            depth=64,
            state=state,
            max_io_bytes=1 << 19,
            server_pid=pid,
            flags=F_USER_RECOVERY,
            tag=tag,
            dev_sectors=2048,
        )

    def query(self, dev_id: int) -> UblkInfo:
        if dev_id not in self.devices:
            raise DeviceError("query: no such device", errno=errno.ENODEV)
        return self.devices[dev_id]

    def end(self, dev_id: int) -> bool:
        """Whether the number is free at once."""
        if self.held:
            self.put(dev_id, self.devices[dev_id].tag, DEAD)
            self.draining.add(dev_id)
        else:
            del self.devices[dev_id]
        return not self.held

    def let_go(self) -> None:
        """Nobody has a device open any more."""
        self.held = False
        for dev_id in self.draining:
            del self.devices[dev_id]
        self.draining.clear()

    def delete(self, dev_id: int, expected_tag: int) -> None:
        if self.query(dev_id).tag != expected_tag:
            raise DeviceError("delete: somebody else's", errno=errno.EPERM)
        self.events.append(f"delete {dev_id}")
        if self.held:
            self.end(dev_id)
            raise DeviceError("delete: timed out", errno=errno.ETIMEDOUT)
        del self.devices[dev_id]


def install_driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Put a driver without devices in the place of the kernel's."""
    made = Driver()
    monkeypatch.setattr("glidefs.core.ublk.query", made.query)
    monkeypatch.setattr("glidefs.core.ublk.delete", made.delete)
    monkeypatch.setattr(ublk, "devices", lambda: iter(sorted(set(made.devices) - made.draining)))
    monkeypatch.setattr(ublk, "is_draining", lambda found: found.dev_id in made.draining)
    monkeypatch.setattr(ublk, "ublk_missing", lambda allow_kernel: None)
    return made


class Core:
    """A volume's core, as far as devices go."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.on_start: Callable[[int], None] = lambda dev_id: None

    def add_ublk(self, config: UblkConfig) -> int:
        dev_id = config.dev_id
        if dev_id == ANY_DEVICE:
            dev_id = min(set(range(100)) - set(self.driver.devices))
        if dev_id in self.driver.devices:
            raise DeviceError("add: taken", errno=errno.EEXIST)
        self.driver.put(dev_id, config.tag, DEAD)
        self.driver.events.append(f"add {dev_id}")
        return dev_id

    def start_ublk(self, config: UblkConfig) -> FakeDevice:
        found = self.driver.query(config.dev_id)
        assert found.tag == config.tag
        assert config.added or (config.recover and found.state in (QUIESCED, FAIL_IO))
        self.on_start(config.dev_id)
        self.driver.events.append(f"{'recover' if config.recover else 'start'} {config.dev_id}")
        self.driver.put(config.dev_id, config.tag, LIVE, os.getpid())
        return FakeDevice(self.driver, config.dev_id)


class FakeDevice:
    def __init__(self, driver: Driver, dev_id: int) -> None:
        self.driver, self.dev_id, self.path = driver, dev_id, f"/dev/ublkb{dev_id}"
        self.lingers = False

    def close(self) -> None:
        self.lingers = not self.driver.end(self.dev_id)

    def release(self) -> None:
        found = self.driver.devices[self.dev_id]
        self.driver.put(self.dev_id, found.tag, QUIESCED)


class Host:
    """A cache directory, with records, on a host with that driver."""

    def __init__(self, home: Path, driver: Driver) -> None:
        self.driver = driver
        self.config = Config(cache=CacheSettings(dir=str(home / "cache")))
        self.state = self.config.cache.state
        self.state.mkdir(parents=True)
        self.records = home / "cache" / "exports"
        self.records.mkdir()
        self.run, self.block = home / "run", home / "block"
        self.names = DeviceNames("ublk", self.run)
        self.core = Core(driver)

    def record(self, name: str, dev_id: int | None = None) -> ExportRecord:
        record = ExportRecord(
            name=name,
            volume_id=name.encode().ljust(16, b"v"),
            log_id=bytes(16),
            prefix="p",
            manifest_hash=bytes(32),
            size=1 << 20,
            device_id=dev_id,
        )
        export_record.save(self.records / f"{name}.json", record)
        return record

    def transport(self) -> UblkTransport:
        return UblkTransport(UblkSettings(), self.state, self.names)

    def attachment(self, record: ExportRecord) -> Attachment:
        return Attachment(
            name=record.name,
            volume_id=record.volume_id,
            size=record.size,
            read_only=False,
            core=self.core,  # type: ignore[arg-type]
            device_id=record.device_id,
        )

    def serve(self, name: str, transport: UblkTransport | None = None) -> int:
        """An export with a record and a device."""
        record = self.record(name)
        endpoint = (transport or self.transport()).start(self.attachment(record))
        assert endpoint.device_id is not None
        self.record(name, endpoint.device_id)
        return endpoint.device_id

    def survey(self) -> dict[int, devices.Device]:
        return {device.id: device for device in devices.survey(self.config, self.run, self.block)}

    def remove(self, dev_id: int) -> devices.Device:
        return devices.remove(self.config, str(dev_id), self.run, self.block)
