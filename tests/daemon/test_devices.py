"""Tags and names of ublk devices, their start and recovery: over a driver that is a dictionary."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

pytest.importorskip("glidefs.core._core")

from driver_rig import Driver, Host, install_driver

from glidefs.core.ublk import UblkConfig
from glidefs.errors import CorruptObject, DeviceError
from glidefs.transport.device.names import DeviceNames
from glidefs.transport.device.tag import OWNER_FILE, DeviceTags, load_tags, make_tags
from glidefs.transport.ublk.device import DEAD, LIVE, QUIESCED


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return install_driver(monkeypatch)


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
    assert "somebody still has" in caplog.text
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
    assert "somebody still has" in caplog.text
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
    host.names = DeviceNames("ublk", tmp_path / "file")
    host.serve("a")
    assert "no name for ublk device 0" in caplog.text
    caplog.clear()


def test_names_of_devices_that_went_unseen_are_swept(host: Host, tmp_path: Path) -> None:
    host.names.announce(7, "gone")
    host.driver.put(8, 77, LIVE, os.getpid())
    host.names.announce(8, "other")
    host.serve("a")
    assert host.names.read(7) == ("", "")
    assert host.names.read(8)[0] == "other"
