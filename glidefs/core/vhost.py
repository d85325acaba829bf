"""vhost-user-blk devices of the C core; see ``csrc/glide_vhost.h``."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from glidefs.core._core import ffi, lib
from glidefs.core.check import CoreError, Handle, check

if TYPE_CHECKING:
    from glidefs.core.volume import CoreVolume

QUEUES = int(lib.GLIDE_VHOST_QUEUES)
DEPTH = int(lib.GLIDE_VHOST_DEPTH)
REGIONS = int(lib.GLIDE_VHOST_REGIONS)
SEGMENTS = int(lib.GLIDE_VHOST_SEGMENTS)
ZERO_RANGES = int(lib.GLIDE_VHOST_ZERO_RANGES)
ZERO_SECTORS = int(lib.GLIDE_VHOST_ZERO_SECTORS)
"""Limits of a device: queues, entries of one, regions; of a request: pieces, ranges and their sectors."""
ID_BYTES = int(lib.GLIDE_VHOST_ID_BYTES)
_LINE = 256


class Region(msgspec.Struct, frozen=True):
    """Memory of a guest, in bytes: where the guest and the front-end have it, and where it is in its file."""

    guest: int
    size: int
    user: int
    offset: int


class Ring(msgspec.Struct, frozen=True):
    """A queue as it begins: addresses of the front-end, entries, the next one to look at."""

    descriptors: int
    available: int
    used: int
    num: int
    base: int
    enabled: bool


def inflight_bytes(depth: int) -> int:
    """Of the record of what is in flight in a queue of so many entries."""
    return int(lib.glide_vhost_inflight_bytes(depth))


class VhostDevice(Handle):
    """What one front-end is served by. Descriptors that are given stay the caller's.

    Every call raises Closed once the device has stopped, CoreError where something cannot be.
    """

    def __init__(self, volume: CoreVolume, device_id: int, serial: bytes, *, read_only: bool) -> None:
        raw = ffi.new("struct glide_vhost_config *")
        raw.id = device_id
        raw.read_only = read_only
        ffi.memmove(raw.serial, serial[:ID_BYTES].ljust(ID_BYTES, b"\0"), ID_BYTES)
        out = ffi.new("glide_vhost **")
        with volume._use() as pointer:
            check(lib.glide_vhost_open(pointer, raw, out), "open vhost-user device")
        super().__init__(out[0])
        self.device_id = device_id

    def _interrupt(self) -> None:
        lib.glide_vhost_end(self._pointer)

    def _free(self, pointer: Any) -> None:
        lib.glide_vhost_close(pointer)

    def features(self, features: int, *, writeback: bool) -> None:
        """What the driver took, and whether writes may be cached until a flush."""
        with self._use() as pointer:
            check(lib.glide_vhost_features(pointer, features, writeback), "features")

    def memory(self, regions: Sequence[tuple[Region, int]]) -> None:
        """The whole memory table: each region with its file, or -1 if it is there already."""
        raw = ffi.new("struct glide_vhost_region[]", len(regions))
        for to, (region, fd) in zip(raw, regions, strict=True):
            to.guest, to.size, to.user, to.offset = msgspec.structs.astuple(region)
            to.fd = fd
        with self._use() as pointer:
            check(lib.glide_vhost_memory(pointer, raw, len(regions)), "memory table")

    def inflight(self, fd: int, offset: int, queues: int, depth: int) -> None:
        """Where the record of what is in flight is kept: of each queue, from ``offset`` of the file on."""
        with self._use() as pointer:
            check(lib.glide_vhost_inflight(pointer, fd, offset, queues, depth), "record of what is in flight")

    def start_ring(self, index: int, ring: Ring, kick: int, call: int) -> None:
        """Serve a queue, what its record says is in flight first. ``call``: an eventfd, or -1."""
        raw = ffi.new(
            "struct glide_vhost_ring *", {**msgspec.structs.asdict(ring), "kick": kick, "call": call}
        )
        with self._use() as pointer:
            check(lib.glide_vhost_ring_start(pointer, index, raw), f"start queue {index}")

    def call(self, index: int, fd: int) -> None:
        """Another eventfd by which the driver is told of answers; -1: none."""
        with self._use() as pointer:
            check(lib.glide_vhost_ring_call(pointer, index, fd), f"queue {index}")

    def enable(self, index: int, *, enabled: bool) -> None:
        """Whether new requests of the queue are begun."""
        with self._use() as pointer:
            check(lib.glide_vhost_ring_enable(pointer, index, enabled), f"queue {index}")

    def stop_ring(self, index: int, *, wait: bool) -> int | None:
        """Begin nothing more. The next entry once all before are answered; without ``wait`` None: not yet."""
        with self._use() as pointer:
            try:
                return check(lib.glide_vhost_ring_stop(pointer, index, wait), f"stop queue {index}")
            except CoreError as error:
                if error.errno == errno.EAGAIN:
                    return None
                raise

    def trouble(self) -> str:
        """Why the core stopped serving it, or nothing."""
        text = ffi.new("char[]", _LINE)
        with self._use() as pointer:
            lib.glide_vhost_trouble(pointer, text, _LINE)
        return str(ffi.string(text).decode(errors="replace"))
