"""Whose a ublk device is, and what may be removed: over a driver that is a dictionary."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("glidefs.core._core")

from driver_rig import NOBODY, Driver, Host, install_driver

from glidefs.config import CacheSettings, Config
from glidefs.core.ublk import UblkInfo
from glidefs.doctor import devices
from glidefs.doctor.doctor import run_checks
from glidefs.errors import DeviceError, NotSupported
from glidefs.transport.device.tag import load_tags, make_tags
from glidefs.transport.ublk.device import DEAD, LIVE, QUIESCED


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return install_driver(monkeypatch)


@pytest.fixture
def host(tmp_path: Path, driver: Driver) -> Host:
    return Host(tmp_path / "one", driver)


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
    for dev_id, why in ((served, "serves it"), (7, "somebody else"), (99, "no device /dev/ublkb99")):
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
    assert [d.owner for d in devices.survey(config, tmp_path / "run")] == ["other"]
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
    check = next(check for check in run_checks(str(config)) if check.name == "devices")
    assert check.state == "warn"
    assert check.detail == (
        "1 served, without a server: /dev/ublkb6 (orphan: no export), /dev/ublkb7 (somebody else's)"
    )
    assert "glidefs devices remove" in check.remedy
