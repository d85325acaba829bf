"""Whose a ublk device is, what may be removed, and what udev is told: over a driver that is a dictionary."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("glidefs.core._core")

from glidefs.config import CacheSettings, Config, UblkSettings
from glidefs.core.ublk import ANY_DEVICE, UblkConfig, UblkInfo
from glidefs.doctor import devices
from glidefs.doctor.doctor import run_checks
from glidefs.errors import CorruptObject, DeviceError, NotSupported
from glidefs.formats import export_record
from glidefs.formats.export_record import ExportRecord
from glidefs.transport.base import Attachment
from glidefs.transport.device.names import DeviceNames
from glidefs.transport.device.tag import OWNER_FILE, DeviceTags, load_tags, make_tags
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
        self.names = DeviceNames(home / "run" / "ublk")
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
        return {device.id: device for device in devices.survey(self.config, self.names)}

    def remove(self, dev_id: int) -> devices.Device:
        return devices.remove(self.config, dev_id, self.names)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr("glidefs.core.ublk.query", made.query)
    monkeypatch.setattr("glidefs.core.ublk.delete", made.delete)
    monkeypatch.setattr(ublk, "devices", lambda: iter(sorted(set(made.devices) - made.draining)))
    monkeypatch.setattr(ublk, "is_draining", lambda found: found.dev_id in made.draining)
    monkeypatch.setattr(ublk, "ublk_missing", lambda allow_kernel: None)
    return made


@pytest.fixture
def host(tmp_path: Path, driver: Driver) -> Host:
    return Host(tmp_path / "one", driver)


# -- tags ------------------------------------------------------------------------------------------


def test_tags_have_two_halves(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    first, second = make_tags(one), make_tags(two)
    tags = {first.tag("a", bytes(16)), first.tag("b", bytes(16)), first.tag("a", b"x" * 16)}
    assert len(tags) == 3
    assert len({tag >> 32 for tag in tags}) == 1
    assert len({tag & 0xFFFFFFFF for tag in tags}) == 3
    assert all(first.is_ours(tag) and not second.is_ours(tag) for tag in tags)
    assert all(0 < tag < 1 << 64 for tag in tags)
    # Read again, they are the same; a directory of the same path with other bytes has others.
    assert load_tags(one).tag("a", bytes(16)) == first.tag("a", bytes(16))
    other = DeviceTags(one, b"o" * 16)
    assert not other.is_ours(first.tag("a", bytes(16)))
    assert not other.accepts(first.tag("a", bytes(16)), "a", bytes(16))
    assert other.names(first.tag("a", bytes(16)), "a", bytes(16))
    assert not other.names(first.tag("a", bytes(16)), "b", bytes(16))


def test_what_other_programs_leave_there_is_nobodys(tmp_path: Path) -> None:
    tags = make_tags(tmp_path)
    for tag in (0, 1, 0xFFFFFFFF):
        assert not tags.is_ours(tag)
        assert not tags.accepts(tag, "a", bytes(16))


def test_reading_writes_nothing(tmp_path: Path) -> None:
    tags = load_tags(tmp_path)
    assert not tags.has_owner
    assert list(tmp_path.iterdir()) == []
    assert not tags.is_ours(0)
    (tmp_path / OWNER_FILE).write_text("nonsense")
    with pytest.raises(CorruptObject):
        load_tags(tmp_path)


@pytest.mark.parametrize("damage", ["", "nonsense", "00" * 15])
def test_a_lost_owner_file_does_not_cost_the_devices(tmp_path: Path, damage: str) -> None:
    """The record names the device, and the half that is the export's matches."""
    old = make_tags(tmp_path).tag("a", bytes(16))
    (tmp_path / OWNER_FILE).write_text(damage)
    again = make_tags(tmp_path)
    assert again.accepts(old, "a", bytes(16))
    assert not again.accepts(old, "b", bytes(16))
    assert not again.is_ours(old)
    assert load_tags(tmp_path).tag("a", bytes(16)) == again.tag("a", bytes(16))


# -- the transport ---------------------------------------------------------------------------------


def test_udev_knows_the_name_before_the_device_shows(host: Host) -> None:
    said: list[tuple[str, str]] = []
    host.core.on_start = lambda dev_id: said.append(host.names.read(dev_id))
    transport = host.transport()
    dev_id = host.serve("web-1.x", transport)
    assert said[0][0] == "web-1.x"
    assert host.driver.events == [f"add {dev_id}", f"start {dev_id}"]
    transport.stop("web-1.x")
    assert host.names.read(dev_id) == ("", "")


def test_a_device_that_cannot_be_started_has_no_name(host: Host) -> None:
    def fail(dev_id: int) -> None:
        del host.driver.devices[dev_id]  # as the core does it
        raise DeviceError("start: no", errno=errno.EIO)

    host.core.on_start = fail
    with pytest.raises(DeviceError):
        host.serve("a")
    assert host.names.read(0) == ("", "")


def test_the_next_device_of_a_number_keeps_its_name(host: Host, tmp_path: Path) -> None:
    """udev's rule for the removal of the old one may run when the new one has its name."""
    transport = host.transport()
    dev_id = host.serve("a", transport)
    _, old_key = host.names.read(dev_id)
    transport.stop("a")
    assert host.serve("b", transport) == dev_id
    host.names.withdraw(dev_id, old_key)
    assert host.names.read(dev_id)[0] == "b"


def test_recovery_keeps_the_name_and_the_id(host: Host) -> None:
    transport = host.transport()
    dev_id = host.serve("a", transport)
    before = host.names.read(dev_id)
    transport.release("a")
    again = host.transport()
    endpoint = again.start(host.attachment(host.record("a", dev_id)))
    assert endpoint.device_id == dev_id
    assert host.names.read(dev_id) == before
    assert host.driver.events[-1] == f"recover {dev_id}"


def test_a_device_of_before_the_two_halves_is_recovered(host: Host) -> None:
    record = host.record("a", 3)
    make_tags(host.state)
    tag = load_tags(host.state).accepted("a", record.volume_id)[-1]
    assert not load_tags(host.state).is_ours(tag)
    host.driver.put(3, tag, QUIESCED)
    assert host.transport().start(host.attachment(record)).device_id == 3
    assert host.driver.events == ["recover 3"]


def test_a_taken_id_and_a_foreign_device(host: Host) -> None:
    host.driver.put(0, 77, LIVE, os.getpid())
    record = host.record("a", 0)
    endpoint = host.transport().start(host.attachment(record))
    assert endpoint.device_id == 1
    assert host.driver.devices[0].tag == 77
    host.driver.events.clear()
    # Taken between the look and the try.
    host.driver.put(5, 78, LIVE, os.getpid())
    config = UblkConfig(tag=9)
    assert host.transport()._make(host.attachment(host.record("b", 5)), config, 5) == 2
    assert host.driver.devices[5].tag == 78


def test_a_number_is_used_again_when_nobody_has_its_device_open(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """By the export that had it, and by others."""
    transport = host.transport()
    first = host.serve("a", transport)
    host.driver.held = True
    transport.stop("a")
    assert "open still" in caplog.text
    caplog.clear()
    transport.discard("a", host.record("a").volume_id, first)  # nothing is left to do
    assert caplog.text == ""
    host.driver.held = False
    second = transport.start(host.attachment(host.record("a", first))).device_id
    assert second is not None
    assert second != first
    assert host.serve("b", transport) not in (first, second)
    assert host.driver.devices[first].state == DEAD
    transport.stop("a")
    host.driver.let_go()
    assert transport.start(host.attachment(host.record("a", first))).device_id == first
    caplog.clear()


def test_a_dead_device_that_somebody_has_open_is_not_replaced_in_place(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """Its record names it, its daemon died before it could be recovered, and a guest holds it."""
    record = host.record("a", 3)
    host.driver.put(3, make_tags(host.state).tag("a", record.volume_id), DEAD)
    host.driver.held = True
    endpoint = host.transport().start(host.attachment(record))
    assert endpoint.device_id == 0
    assert host.driver.events == ["delete 3", "add 0", "start 0"]
    assert "open still" in caplog.text
    caplog.clear()


def test_devices_of_a_lost_disk_are_deleted(host: Host) -> None:
    """The same volume, on the same path, but the directory is another by now."""
    record = host.record("a")
    lost = DeviceTags(host.state, b"l" * 16)
    host.driver.put(4, lost.tag("a", record.volume_id), QUIESCED)
    host.driver.put(5, lost.tag("b", record.volume_id), QUIESCED)
    host.driver.put(6, lost.tag("a", record.volume_id), LIVE, os.getpid())
    host.transport().start(host.attachment(record))
    assert sorted(host.driver.devices) == [0, 5, 6]


def test_the_device_of_an_export_that_was_not_served_goes_with_it(host: Host) -> None:
    transport = host.transport()
    dev_id = host.serve("a", transport)
    record = host.record("a", dev_id)
    again = host.transport()
    again.discard("a", record.volume_id, dev_id)  # somebody serves it
    assert dev_id in host.driver.devices
    transport.release("a")
    again.discard("a", b"o" * 16, dev_id)  # another volume's
    assert dev_id in host.driver.devices
    again.discard("a", record.volume_id, dev_id)
    assert dev_id not in host.driver.devices
    assert host.names.read(dev_id) == ("", "")
    again.discard("a", record.volume_id, dev_id)


def test_names_that_cannot_be_written_are_done_without(
    host: Host, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    host.names = DeviceNames(tmp_path / "file" / "ublk")
    host.serve("a")
    assert "no name for /dev/ublkb0" in caplog.text
    caplog.clear()


def test_names_of_devices_that_went_unseen_are_swept(host: Host, tmp_path: Path) -> None:
    host.names.announce(7, "gone")
    host.driver.put(8, 77, LIVE, os.getpid())
    host.names.announce(8, "other")
    host.serve("a")
    assert host.names.read(7) == ("", "")
    assert host.names.read(8)[0] == "other"


# -- whose it is -----------------------------------------------------------------------------------


def test_every_kind_of_device(host: Host, tmp_path: Path) -> None:
    served = host.serve("a")
    tags = load_tags(host.state)
    paused = host.record("b", 5)
    host.driver.put(5, tags.tag("b", paused.volume_id), QUIESCED)
    host.driver.put(6, tags.tag("gone", bytes(16)), QUIESCED)
    host.names.announce(6, "gone")
    host.driver.put(7, 12345, QUIESCED)
    host.names.announce(7, "theirs")
    other = Host(tmp_path / "other", host.driver)
    theirs = other.serve("a")
    found = host.survey()
    assert {d.id: (d.owner, d.state, d.export) for d in found.values()} == {
        served: ("export", "served", "a"),
        5: ("export", "paused", "b"),
        6: ("orphan", "paused", "gone"),
        7: ("other", "paused", ""),
        theirs: ("other", "served", ""),
    }
    assert found[served].server == os.getpid()
    assert found[6].size == 1 << 20
    assert [d.id for d in found.values() if not d.keep] == [6]


def test_an_orphan_is_removed_and_nothing_else(host: Host) -> None:
    transport = host.transport()
    served = host.serve("a", transport)
    tags = load_tags(host.state)
    host.driver.put(6, tags.tag("gone", bytes(16)), QUIESCED)
    host.driver.put(7, 12345, QUIESCED)
    host.names.announce(6, "gone")
    host.driver.events.clear()
    assert host.remove(6).export == "gone"
    assert host.names.read(6) == ("", "")
    for dev_id, why in ((served, "serves it"), (7, "somebody else"), (99, "no ublk device 99")):
        with pytest.raises((NotSupported, DeviceError), match=why):
            host.remove(dev_id)
    transport.release("a")
    with pytest.raises(NotSupported, match="export a: the daemon recovers it"):
        host.remove(served)
    assert host.driver.events == ["delete 6"]


@pytest.mark.parametrize(
    ("state", "recorded", "goes"),
    [
        (QUIESCED, 9, True),  # the record names another: it is served there, or will be
        (DEAD, 9, False),  # it may be one that is just being made
        (QUIESCED, None, False),
        (QUIESCED, 6, False),
        (LIVE, 9, False),
    ],
)
def test_a_second_device_of_an_export(host: Host, state: int, recorded: int | None, goes: bool) -> None:
    make_tags(host.state)
    record = host.record("a", recorded)
    host.driver.put(6, load_tags(host.state).tag("a", record.volume_id), state, NOBODY)
    if goes:
        host.remove(6)
        return
    with pytest.raises(NotSupported):
        host.remove(6)
    assert 6 in host.driver.devices


def test_an_orphan_that_a_damaged_record_may_need(host: Host) -> None:
    make_tags(host.state)
    tags = load_tags(host.state)
    host.driver.put(6, tags.tag("hurt", bytes(16)), QUIESCED)
    host.driver.put(7, tags.tag("gone", bytes(16)), QUIESCED)
    (host.records / "hurt.json").write_text("{")
    host.names.announce(7, "gone")
    with pytest.raises(NotSupported, match="damaged"):
        host.remove(6)
    host.names.announce(6, "hurt")
    with pytest.raises(NotSupported, match="hurt"):
        host.remove(6)
    host.remove(7)


@pytest.mark.parametrize(
    ("pid", "why"),
    [(-1, "not visible here"), (NOBODY, "not noticed yet"), (os.getpid(), "serves it")],
    ids=["not visible", "nobody", "this process"],
)
def test_an_orphan_that_is_served_stays(host: Host, pid: int, why: str) -> None:
    make_tags(host.state)
    host.driver.put(6, load_tags(host.state).tag("gone", bytes(16)), LIVE, pid)
    with pytest.raises(NotSupported, match=why):
        host.remove(6)
    assert host.driver.events == []


def test_an_orphan_that_somebody_has_open(host: Host) -> None:
    make_tags(host.state)
    host.driver.put(6, load_tags(host.state).tag("gone", bytes(16)), QUIESCED)
    host.driver.held = True
    assert "when they close it" in host.remove(6).keep


def test_without_a_cache_directory_everything_is_somebody_elses(tmp_path: Path, driver: Driver) -> None:
    config = Config(cache=CacheSettings(dir=str(tmp_path / "none")))
    driver.put(1, 5, QUIESCED)
    assert [d.owner for d in devices.survey(config, DeviceNames(tmp_path / "run"))] == ["other"]
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_appears_while_one_looks(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices are looked at first: one that is there has its record on the disk already."""
    make_tags(host.state)
    real = host.driver.query

    def query(dev_id: int) -> UblkInfo:
        host.record("new", 6)
        return real(dev_id)

    host.driver.put(6, load_tags(host.state).tag("new", b"new".ljust(16, b"v")), DEAD)
    monkeypatch.setattr("glidefs.core.ublk.query", query)
    assert host.survey()[6].owner == "export"


def test_doctor_lists_them(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glidefs.transport.device.names.DeviceNames.read", lambda self, dev_id: ("", ""))
    host.serve("a")
    tags = load_tags(host.state)
    host.driver.put(6, tags.tag("gone", bytes(16)), QUIESCED)
    host.driver.put(7, 12345, QUIESCED)
    config = tmp_path / "g.toml"
    (tmp_path / "store").mkdir()
    config.write_text(f'[cache]\ndir = "{host.config.cache.dir}"\n[store]\nurl = "file://{tmp_path}/store"\n')
    check = next(check for check in run_checks(str(config)) if check.name == "ublk devices")
    assert check.state == "warn"
    assert check.detail == (
        "1 served, without a server: /dev/ublkb6 (orphan: no export), /dev/ublkb7 (somebody else's)"
    )
    assert "glidefs devices remove" in check.remedy
