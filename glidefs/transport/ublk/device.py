"""ublk devices: one per export, with an id that stays, and a tag that says whose it is.

The kernel keeps a device whose server died or left (QUIESCED: guests wait). On start such a device
is recovered if the tag in its `ublksrv_flags` is ours; a device with another tag is never touched. Before
a new device is started, udev is told its name.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from glidefs.config import UblkSettings
from glidefs.core import ublk
from glidefs.core.ublk import ANY_DEVICE, UblkConfig, UblkDevice, UblkInfo
from glidefs.errors import DeviceError, NotSupported
from glidefs.transport.base import Attachment, Endpoint
from glidefs.transport.device.names import DeviceNames
from glidefs.transport.device.tag import DeviceTags, make_tags
from glidefs.transport.device.use import device_use
from glidefs.transport.ublk.driver import ublk_missing

log = logging.getLogger(__name__)

DEAD, LIVE, QUIESCED, FAIL_IO = 0, 1, 2, 3
"""Device states of the driver (UBLK_S_DEV_*)."""
F_USER_RECOVERY = 1 << 3
F_UPDATE_SIZE = 1 << 10
TAKEOVER_WAIT = 15.0
"""Seconds until a device whose server is gone must be QUIESCED (the kernel notices when it is reaped)."""
_POLL = 0.002

_REMEDIES = {
    errno.EPERM: "the daemon needs CAP_SYS_ADMIN: run it as root",
    errno.EACCES: "no permission: run the daemon as root",
    errno.ENOENT: "the ublk driver is not loaded: 'modprobe ublk_drv'",
    errno.EOPNOTSUPP: "this kernel's ublk driver is too old; use Linux 6.12 or later, or --transport nbd",
    errno.ENOSYS: "io_uring is missing or forbidden here (sysctl kernel.io_uring_disabled)",
    errno.EBUSY: "another process still holds the device",
}


def query(dev_id: int) -> UblkInfo | None:
    """The kernel's view of a device, or None where there is none. Raises DeviceError."""
    try:
        return ublk.query(dev_id)
    except DeviceError as error:
        if error.errno == errno.ENODEV:
            return None
        raise explained(error) from error


def devices() -> Iterator[int]:
    """Ids of all ublk devices of this host, by their control nodes."""
    for node in sorted(Path("/dev").glob("ublkc*")):
        number = node.name.removeprefix("ublkc")
        if number.isdigit():
            yield int(number)


def is_draining(found: UblkInfo) -> bool:
    """Whether a device was deleted, but the kernel keeps its number: somebody has it open.

    So its requests may not all have ended, and the number is not another device's yet.
    """
    return found.state == DEAD and not Path(f"/dev/ublkc{found.dev_id}").exists()


def explained(error: DeviceError) -> DeviceError:
    """The same error with what to do about it."""
    remedy = _REMEDIES.get(error.errno)
    return DeviceError(f"{error}; {remedy}", errno=error.errno) if remedy else error


def _say_open(name: str, dev_id: int) -> None:
    log.warning(
        "%s: somebody still has /dev/ublkb%d open, all I/O on it fails: close it (fuser -v /dev/ublkb%d), "
        "its number is used again after that",
        name,
        dev_id,
        dev_id,
    )


def _is_served(found: UblkInfo) -> bool:
    """Whether a process serves the device; one that died may not have been noticed yet."""
    return found.state == LIVE and Path(f"/proc/{found.server_pid}").exists()


class UblkTransport:
    """The devices of this daemon. `_lock` guards what follows it; calls for one export never overlap."""

    kind = "ublk"

    def __init__(self, settings: UblkSettings, state_dir: Path, names: DeviceNames | None = None) -> None:
        self._settings = settings
        self._state_dir = state_dir
        self._names = names or DeviceNames("ublk")
        self._lock = threading.Lock()
        self._tags: DeviceTags | None = None
        self._devices: dict[str, tuple[UblkDevice, str]] = {}
        """By export: the device, and the key that udev knows it by."""

    def missing(self) -> str | None:
        """The driver, permission, or a kernel that survives it."""
        return ublk_missing(self._settings.allow_kernel)

    def prepare(self, device_id: int | None) -> None:
        """Read whose devices are ours, and open the way to the driver."""
        if device_id is not None:
            self._own_tags()
            query(device_id)

    def start(self, export: Attachment) -> Endpoint:
        """Recover the device of this export, or add one, by preference with its old id."""
        missing = self.missing()
        if missing:
            raise NotSupported(f"ublk cannot be used: {missing}; or use --transport nbd")
        try:
            device, key = self._start(export, self._own_tags())
        except DeviceError as error:
            raise explained(error) from error
        with self._lock:
            self._devices[export.name] = device, key
        return Endpoint(device=device.path, device_id=device.dev_id)

    def _own_tags(self) -> DeviceTags:
        """Made with the first device, so that a host without ublk is left alone."""
        with self._lock:
            if self._tags is None:
                self._tags = make_tags(self._state_dir)
                self._names.sweep(devices())
            return self._tags

    def _start(self, export: Attachment, tags: DeviceTags) -> tuple[UblkDevice, str]:
        wanted = export.device_id
        found = None if wanted is None else query(wanted)
        if wanted is None or found is None:
            return self._add(export, tags, wanted)
        if is_draining(found):
            log.warning("%s: /dev/ublkb%d is still open; taking another id", export.name, wanted)
            return self._add(export, tags, None)
        if not tags.accepts(found.tag, export.name, export.volume_id):
            log.warning("%s: /dev/ublkb%d belongs to somebody else; taking another id", export.name, wanted)
            return self._add(export, tags, None)
        found = self._settled(export.name, found)
        if found.state in (QUIESCED, FAIL_IO) and found.flags & F_USER_RECOVERY:
            return self._recover(export, found)
        log.info("%s: replacing the stopped device /dev/ublkb%d", export.name, wanted)
        return self._add(export, tags, wanted if self._delete(export.name, found) else None)

    def _delete(self, name: str, found: UblkInfo) -> bool:
        """Whether its number is free now; if not, it is when those who have it open let go."""
        try:
            ublk.delete(found.dev_id, found.tag)
        except DeviceError as error:
            if error.errno != errno.ETIMEDOUT:
                raise
            _say_open(name, found.dev_id)
            return False
        return True

    def _settled(self, name: str, found: UblkInfo) -> UblkInfo:
        """Wait until the kernel has noticed that the device's last server is gone."""
        deadline = time.monotonic() + TAKEOVER_WAIT
        while found.state == LIVE:
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"/dev/ublkb{found.dev_id} of {name} is still served: stop process {found.server_pid}"
                )
            time.sleep(_POLL)
            again = query(found.dev_id)
            if again is None:
                return UblkInfo(**{**{f: getattr(found, f) for f in found.__struct_fields__}, "state": DEAD})
            found = again
        return found

    def _config(self, export: Attachment, tag: int, dev_id: int) -> UblkConfig:
        return UblkConfig(
            dev_id=dev_id,
            queue_depth=self._settings.queue_depth,
            max_io_bytes=self._settings.max_io,
            read_only=export.read_only,
            tag=tag,
        )

    def _add(self, export: Attachment, tags: DeviceTags, dev_id: int | None) -> tuple[UblkDevice, str]:
        self._delete_lost(export, tags)
        config = self._config(export, tags.tag(export.name, export.volume_id), ANY_DEVICE)
        made = self._make(export, config, dev_id)
        key = self._names.announce(made, export.name)
        try:
            return export.core.start_ublk(replace(config, dev_id=made, added=True)), key
        except BaseException:
            self._names.withdraw(made, key)
            raise

    def _make(self, export: Attachment, config: UblkConfig, dev_id: int | None) -> int:
        """A device that shows nothing yet, by preference with this id."""
        if dev_id is not None:
            try:
                return export.core.add_ublk(replace(config, dev_id=dev_id))
            except DeviceError as error:
                if error.errno != errno.EEXIST:
                    raise
                log.warning("%s: device id %d is taken; taking another", export.name, dev_id)
        return export.core.add_ublk(config)

    def _delete_lost(self, export: Attachment, tags: DeviceTags) -> None:
        """Delete devices of this export that no record names: the local disk was lost, or the record late.

        They are not recovered: the log that they promised guests may be gone, and an error is better than
        other data. Left alone they would make whoever reads them wait for ever.
        """
        name = export.name
        for dev_id in devices():
            found = query(dev_id)
            if found is None or not tags.names(found.tag, name, export.volume_id) or _is_served(found):
                continue
            log.warning("%s: deleting /dev/ublkb%d, which no record of this host names", name, dev_id)
            try:
                ublk.delete(dev_id, found.tag)
            except DeviceError as error:
                log.warning("%s: /dev/ublkb%d cannot be deleted: %s", name, dev_id, error)

    def _recover(self, export: Attachment, found: UblkInfo) -> tuple[UblkDevice, str]:
        config = replace(self._config(export, found.tag, found.dev_id), recover=True)
        device = export.core.start_ublk(config)  # its guests wait; udev has seen it
        key = self._names.announce(found.dev_id, export.name)
        log.info("%s: recovered /dev/ublkb%d", export.name, found.dev_id)
        if found.dev_sectors and found.dev_sectors * 512 != export.size:
            if self._can_update():
                device.update_size(export.size)
            else:
                log.warning("%s: the recovered device keeps its old size; detach and attach it", export.name)
        return device, key

    def _take(self, name: str) -> tuple[UblkDevice, str] | None:
        with self._lock:
            return self._devices.pop(name, None)

    def stop(self, name: str) -> None:
        """Stop and delete the device. Guests that have it open see it vanish."""
        found = self._take(name)
        if found is not None:
            device, key = found
            device.close()
            if device.lingers:
                _say_open(name, device.dev_id)
            self._names.withdraw(device.dev_id, key)

    def release(self, name: str) -> None:
        """Leave the device to the kernel: guests pause until the next start recovers it."""
        found = self._take(name)
        if found is not None:
            found[0].release()

    def discard(self, name: str, volume_id: bytes, device_id: int) -> None:
        """Delete the device that an earlier daemon left: else its guests wait for ever."""
        found = query(device_id)
        if found is None or found.state == LIVE or is_draining(found):
            return
        if not self._own_tags().accepts(found.tag, name, volume_id):
            return
        log.info("%s: deleting /dev/ublkb%d, which nobody serves", name, device_id)
        self._delete(name, found)
        self._names.withdraw(device_id, self._names.read(device_id)[1])

    def in_use(self, name: str) -> str:
        """Whoever has the device open counts, a mount too."""
        with self._lock:
            found = self._devices.get(name)
        return "" if found is None else device_use(found[0].path)

    def _can_update(self) -> bool:
        try:
            return bool(ublk.features() & F_UPDATE_SIZE)
        except DeviceError:
            return False

    def check_resize(self, export: Attachment, size: int) -> None:
        """A device that cannot change its size must not be larger than its volume."""
        if size < export.size and not self._can_update():
            raise NotSupported(
                f"{export.name}: this kernel cannot shrink a ublk device while it is attached; Linux 6.16 can"
            )

    def resize(self, export: Attachment) -> str:
        """Tell the kernel, or say why the guest does not see it yet."""
        with self._lock:
            found = self._devices.get(export.name)
        if found is None:
            return ""
        if not self._can_update():
            return (
                "this kernel cannot resize a ublk device while it is attached (Linux 6.16 can): "
                "detach and attach the export to see the new size"
            )
        found[0].update_size(export.size)
        return ""
