"""ublk devices of the C core (csrc/transport/ublk/ublk_ctrl, csrc/transport/ublk/ublk_queue)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from glidefs.core._core import ffi, lib
from glidefs.core.check import Handle, check

if TYPE_CHECKING:
    from glidefs.core.volume import CoreVolume

ANY_DEVICE = 0xFFFFFFFF
CONTROL = "/dev/ublk-control"


class UblkConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Geometry of a device. ``tag`` is a hash of the export, kept by the kernel beside the device.

    ``recover`` adopts the existing device ``dev_id`` instead of adding one; ``added`` starts the one that
    :func:`add` has made.
    """

    dev_id: int = ANY_DEVICE
    queue_depth: int = 64
    max_io_bytes: int = 512 << 10
    read_only: bool = False
    tag: int = 0
    recover: bool = False
    added: bool = False
    max_discard_bytes: int = 1 << 30


class UblkInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel says about a device. ``dev_sectors`` are of 512 bytes."""

    dev_id: int
    queues: int
    depth: int
    state: int
    max_io_bytes: int
    server_pid: int
    flags: int
    tag: int
    dev_sectors: int


class UblkDevice(Handle):
    """A served ``/dev/ublkbN``. ``close()`` stops and deletes it, ``release()`` leaves it to a successor."""

    __slots__ = ("_keep", "_volume", "dev_id", "lingers")

    def __init__(self, volume: CoreVolume, config: UblkConfig) -> None:
        out = ffi.new("glide_ublk **")
        raw = ffi.new("struct glide_ublk_config *", msgspec.structs.asdict(config))
        with volume._use() as pointer:
            check(lib.glide_ublk_start(pointer, raw, out), "start", device=_name(config.dev_id))
        super().__init__(out[0])
        self._volume = volume
        volume.devices += 1
        self._keep = False
        self.lingers = False
        """Once it is closed: somebody has it open, and its number is free when they let go."""
        self.dev_id = check(lib.glide_ublk_dev_id(out[0]), "device id", device=_name(config.dev_id))

    @property
    def path(self) -> str:
        """The block device's path."""
        return f"/dev/{_name(self.dev_id)}"

    def release(self) -> None:
        """Give the device back to the kernel without stopping it: guests wait for the next server."""
        self._keep = True
        self.close()

    def update_size(self, size: int) -> None:
        """Tell the kernel the new size in bytes. Raises DeviceError where it cannot."""
        with self._use() as pointer:
            check(lib.glide_ublk_update_size(pointer, size), "update size", device=_name(self.dev_id))

    def _free(self, pointer: Any) -> None:
        self._volume.devices -= 1
        end = lib.glide_ublk_release if self._keep else lib.glide_ublk_stop
        what = "release" if self._keep else "stop"
        self.lingers = check(end(pointer), what, device=_name(self.dev_id)) > 0 and not self._keep


def add(volume: CoreVolume, config: UblkConfig) -> int:
    """Make a device for a volume, to be started with ``added``. Returns its id. Raises DeviceError."""
    out = ffi.new("uint32_t *")
    raw = ffi.new("struct glide_ublk_config *", msgspec.structs.asdict(config))
    with volume._use() as pointer:
        check(lib.glide_ublk_add(pointer, raw, out), "add", device=_name(config.dev_id))
    return int(out[0])


def features() -> int:
    """The feature bits that the running driver offers. Raises DeviceError where there is no driver."""
    out = ffi.new("uint64_t *")
    check(lib.glide_ublk_features(out), "features", device=CONTROL)
    return int(out[0])


def query(dev_id: int) -> UblkInfo:
    """The kernel's view of a device. Raises DeviceError (errno ENODEV) where there is none."""
    out = ffi.new("struct glide_ublk_info *")
    check(lib.glide_ublk_query(dev_id, out), "query", device=_name(dev_id))
    return UblkInfo(**{name: int(getattr(out, name)) for name in UblkInfo.__struct_fields__})


def delete(dev_id: int, expected_tag: int) -> None:
    """Delete a device nobody serves, if its tag is ``expected_tag``. Raises DeviceError."""
    check(lib.glide_ublk_delete(dev_id, expected_tag), "delete", device=_name(dev_id))


def _name(dev_id: int) -> str:
    return "ublk device" if dev_id == ANY_DEVICE else f"ublkb{dev_id}"
