"""The ublk and NBD devices of this host: who owns them, and the removal of those that no export needs.

Works with and without a daemon. A device is known by its tag: that of an export with a record here; an
orphan, made in this cache directory for an export without one; or somebody else's, which nothing here ever
touches. The record of an export is on the disk before its device exists, and goes after it; so whoever looks
at the devices first and at the records then never takes one that is just being made for an orphan.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from glidefs.config import Config
from glidefs.core import ublk as core
from glidefs.core.ublk import UblkInfo
from glidefs.errors import DeviceError, NotSupported
from glidefs.exports.table import RecordDirectory
from glidefs.formats.export_record import ExportRecord
from glidefs.transport.device.names import DIRECTORY, DeviceNames
from glidefs.transport.device.tag import load_tags
from glidefs.transport.nbd_device import driver
from glidefs.transport.nbd_device.device import path_of, tag_of
from glidefs.transport.nbd_device.netlink import NbdControl
from glidefs.transport.ublk import device as ublk

State = Literal["served", "paused", "failing", "connected", "stopped"]
Owner = Literal["export", "orphan", "other"]
_STATES: dict[int, State] = {ublk.LIVE: "served", ublk.QUIESCED: "paused", ublk.FAIL_IO: "failing"}


class Device(Struct, frozen=True, kw_only=True):
    """A device of this host.

    ``state``: served by process ``server``; paused or failing (its server is gone, and readers wait or get
    errors); connected (an NBD device: whether somebody serves it does not show); stopped (it shows no disk).
    ``id`` is the number in its name. ``export``: for an orphan, the one that it was made for, if that is
    still known. ``size`` in bytes. ``keep`` says why it may not be removed, or is empty.
    """

    id: int
    device: str
    state: State
    owner: Owner
    export: str = ""
    server: int = 0
    size: int = 0
    keep: str = ""


class _Records:
    """The export records of a cache directory, by the tags of their devices."""

    def __init__(self, config: Config) -> None:
        self.tags = load_tags(config.cache.state)
        self.place = config.cache.dir
        records, self.damaged = RecordDirectory(Path(config.cache.dir) / "exports").load()
        self._by_tag: dict[int, ExportRecord] = {}
        for record in records:
            for tag in self.tags.accepted(record.name, record.volume_id):
                self._by_tag[tag] = record

    def find(self, tag: int) -> ExportRecord | None:
        """The export that has devices with this tag."""
        return self._by_tag.get(tag)


def survey(config: Config, directory: Path = DIRECTORY, block: Path = driver.BLOCK) -> list[Device]:
    """All ublk and NBD devices of this host. Raises DeviceError, CorruptObject (of the owner file), OSError.

    ``directory``: where their names are; ``block``: `/sys/block`.
    """
    return [device for device, _ in _survey(config, directory, block)]


def _survey(config: Config, directory: Path, block: Path) -> list[tuple[Device, int]]:
    """The devices, each with its tag."""
    found = [info for info in map(ublk.query, ublk.devices()) if info is not None]
    connected = list(driver.states(block))
    records = _Records(config)  # after the devices: see above
    ublk_names, nbd_names = DeviceNames("ublk", directory), DeviceNames("nbd", directory)
    return [(_describe(info, records, ublk_names), info.tag) for info in found] + [
        (_describe_nbd(state, records, nbd_names), tag_of(state) or 0) for state in connected
    ]


def _describe_nbd(state: driver.NbdState, records: _Records, names: DeviceNames) -> Device:
    tag = tag_of(state)
    record = records.find(tag) if tag else None
    owner: Owner = "export" if record else "orphan" if tag and records.tags.is_ours(tag) else "other"
    device = Device(
        id=state.index,
        device=path_of(state.index),
        state="connected",
        owner=owner,
        export=record.name if record else names.read(state.index)[0] if owner == "orphan" else "",
        size=state.size,
    )
    return replace(device, keep=_why_keep(device, record, records))


def _describe(info: UblkInfo, records: _Records, names: DeviceNames) -> Device:
    record = records.find(info.tag)
    owner: Owner = "export" if record else "orphan" if records.tags.is_ours(info.tag) else "other"
    device = Device(
        id=info.dev_id,
        device=f"/dev/ublkb{info.dev_id}",
        state=_STATES.get(info.state, "stopped"),
        owner=owner,
        export=record.name if record else names.read(info.dev_id)[0] if owner == "orphan" else "",
        server=info.server_pid if info.state == ublk.LIVE else 0,
        size=info.dev_sectors * 512,
    )
    return replace(device, keep=_why_keep(device, record, records))


def _why_keep(device: Device, record: ExportRecord | None, records: _Records) -> str:
    if device.owner == "other":
        return f"it belongs to somebody else: no daemon with the cache directory {records.place} made it"
    if device.state == "served":
        return _server_text(device.server)
    if record is not None and (device.state == "stopped" or record.device_id in (None, device.id)):
        return (
            f"it belongs to export {record.name}: the daemon recovers it when it starts; "
            f"`glidefs detach {record.name}` or `glidefs remove {record.name}` ends it"
        )
    if record is None and records.damaged and device.export in ("", *records.damaged):
        some = ", ".join(sorted(records.damaged)[:3])
        return f"it may belong to an export whose record is damaged ({some}): see `glidefs list`"
    return ""


def _server_text(pid: int) -> str:
    if pid <= 0:
        return "a process that is not visible here serves it"
    if not Path(f"/proc/{pid}").exists():
        return f"the kernel has not noticed yet that its server (process {pid}) is gone: try again"
    return f"process {pid} serves it"


def remove(config: Config, which: str, directory: Path = DIRECTORY, block: Path = driver.BLOCK) -> Device:
    """Delete a device of this cache directory that no export needs. Returns what it was.

    ``which``: its path, or the number of a ublk device. Whoever has it open gets errors; it is gone when they
    let go. Raises NotSupported for any other device, DeviceError where there is none or the kernel refuses;
    CorruptObject, OSError.
    """
    path = f"/dev/ublkb{which}" if which.isdigit() else f"/dev/{which.removeprefix('/dev/')}"
    found = {device.device: (device, tag) for device, tag in _survey(config, directory, block)}
    if path not in found:
        raise DeviceError(f"there is no device {path}; `glidefs devices` lists them")
    device, tag = found[path]
    if device.keep:
        raise NotSupported(f"{device.device} stays: {device.keep}")
    return (
        _remove_ublk(device, tag, directory)
        if path.startswith("/dev/ublkb")
        else _remove_nbd(device, directory)
    )


def _remove_ublk(device: Device, tag: int, directory: Path) -> Device:
    names = DeviceNames("ublk", directory)
    _, key = names.read(device.id)
    try:
        core.delete(device.id, tag)
    except DeviceError as error:
        if error.errno == errno.ETIMEDOUT:
            return replace(device, keep="somebody has it open: it disappears when they close it")
        raise ublk.explained(error) from error
    names.withdraw(device.id, key)
    return device


def _remove_nbd(device: Device, directory: Path) -> Device:
    names = DeviceNames("nbd", directory)
    _, key = names.read(device.id)
    with NbdControl() as control:
        control.disconnect(device.id)
    names.withdraw(device.id, key)
    return device
