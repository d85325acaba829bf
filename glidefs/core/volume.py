"""A volume in the C core: its write log, its maps, and I/O through its worker."""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from glidefs.core._core import ffi, lib
from glidefs.core.check import CoreError, Handle, check
from glidefs.core.figures import OPS, VolumeInfo, VolumeStats, infos_from, stats_from
from glidefs.core.shadow import ShadowFile, to_c
from glidefs.core.ublk import UblkConfig, UblkDevice
from glidefs.core.ublk import add as add_device

if TYPE_CHECKING:
    from glidefs.core.cache import Slot
    from glidefs.core.engine import Engine

BLOCK = int(lib.GLIDE_BLOCK)
GROUP = int(lib.GLIDE_GROUP)
"""Blocks of a chunk, and chunks of a manifest page: what :class:`Holes` is about."""


class VolumeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the core must know of a volume. ``cookie`` names it in faults and events.

    ``log_dir`` holds the segments of this log id; segments up to ``committed_seq`` are in the store
    and are not replayed. ``size`` in bytes, a multiple of 4096. ``standby``: another process serves the log
    until :func:`glidefs.core.handoff.activate`.
    """

    cookie: int
    log_dir: str | os.PathLike[str]
    volume_id: bytes
    log_id: bytes
    size: int
    committed_seq: int = 0
    read_only: bool = False
    flush_store: bool = False
    always_verify: bool = False
    standby: bool = False


class Recovery(NamedTuple):
    """What a replay found: ``verified`` of ``bytes`` were hashed, ``dropped`` torn, ``repaired`` headers."""

    segments: int
    records: int
    bytes: int
    verified: int
    dropped: int
    last_seq: int
    repaired: int


class Install(msgspec.Struct, frozen=True):
    """An answer for ``count`` blocks from ``block``; made by the functions below."""

    block: int
    count: int
    slot: int
    generation: int
    kind: int
    err: int


def install_slot(block: int, slot: Slot) -> Install:
    """The base of ``block`` is this pinned slot; the install takes the pin over."""
    return Install(block, 1, slot.slot, slot.generation, lib.GLIDE_INSTALL_SLOT, 0)


def install_zero(block: int, count: int) -> Install:
    """The base of these blocks is zero."""
    return Install(block, count, 0, 0, lib.GLIDE_INSTALL_ZERO, 0)


def install_error(block: int, count: int, err: int) -> Install:
    """Requests that wait for these blocks fail with the positive errno ``err``."""
    return Install(block, count, 0, 0, lib.GLIDE_INSTALL_ERROR, err)


def install_retry(block: int, count: int) -> Install:
    """Nothing was learnt about these blocks: requests that wait for them look again."""
    return Install(block, count, 0, 0, lib.GLIDE_INSTALL_RETRY, 0)


class Holes(msgspec.Struct, frozen=True):
    """Which parts of a page or chunk are zero, made by the functions below; bit i of ``zeros`` is part i."""

    kind: int
    number: int
    zeros: int
    err: int = 0


def page_holes(page: int, zeros: int) -> Holes:
    """Chunk i of the page is all zeros in the base where bit i of ``zeros`` is set."""
    return Holes(lib.GLIDE_HOLES_PAGE, page, zeros)


def chunk_holes(chunk: int, zeros: int) -> Holes:
    """Block i of the chunk is zero in the base where bit i of ``zeros`` is set; the others are not."""
    return Holes(lib.GLIDE_HOLES_CHUNK, chunk, zeros)


def holes_error(chunk: int, err: int) -> Holes:
    """Requests that ask for the chunk's zeros get the positive errno ``err``, or with 0 look again."""
    return Holes(lib.GLIDE_HOLES_ERROR, chunk, 0, err)


class Changed(NamedTuple):
    """What may have changed since a snapshot: sectors of 4 KiB from ``first`` up to ``end``.

    ``changed`` is of the first one; at each of ``edges``, ascending sectors between the two, it turns into
    its opposite. ``last_segment`` of the log is the last one that the manifest includes which was compared.
    """

    first: int
    end: int
    changed: bool
    edges: Sequence[int]
    last_segment: int


class Fill(NamedTuple):
    """A block that was fetched: 128 KiB, its key in the cache and the hash of its content (16 bytes)."""

    block: int
    key: bytes
    hash: bytes
    data: bytes | bytearray | memoryview


class NbdModes(msgspec.Struct, frozen=True):
    """The result of the handshake of an NBD connection.

    ``structured`` replies, and ``allocation``, which needs them: the context ``base:allocation``, under the
    id :data:`ALLOCATION_ID`. ``kernel``: the client is the kernel's driver, which sends again what had no
    answer when its connection ended; so nothing of an ended one is still carried out. ``extended`` headers
    need ``structured``. ``changed`` are snapshots, at most :data:`MAX_SNAPSHOTS`: each has a context, under
    the ids after :data:`ALLOCATION_ID`.
    """

    read_only: bool = False
    structured: bool = False
    allocation: bool = False
    kernel: bool = False
    changed: tuple[int, ...] = ()
    extended: bool = False

    def to_c(self) -> Any:
        """The ``struct glide_nbd_handshake *``. Raises ValueError for too many snapshots."""
        if len(self.changed) > MAX_SNAPSHOTS:
            raise ValueError(f"{len(self.changed)} snapshots, at most {MAX_SNAPSHOTS}")
        raw = ffi.new("struct glide_nbd_handshake *")
        raw.modes = (
            self.read_only * int(lib.GLIDE_NBD_READ_ONLY)
            | self.structured * int(lib.GLIDE_NBD_STRUCTURED)
            | self.allocation * int(lib.GLIDE_NBD_ALLOCATION)
            | self.kernel * int(lib.GLIDE_NBD_KERNEL)
            | self.extended * int(lib.GLIDE_NBD_EXTENDED)
        )
        raw.snapshots = len(self.changed)
        for i, snapshot in enumerate(self.changed):
            raw.changed[i] = snapshot
        return raw


READ_WRITE = NbdModes()
ALLOCATION_ID = int(lib.GLIDE_NBD_CONTEXT)
"""The id of the context ``base:allocation`` in replies."""
MAX_SNAPSHOTS = int(lib.GLIDE_NBD_SNAPSHOTS)
"""Contexts of snapshots that a connection can have."""
MAX_SNAPSHOT = (1 << 64) - 1
"""The largest number of a snapshot that has a context."""


class CoreVolume(Handle):
    """An open volume of the core. Made by :meth:`Engine.open_volume`; all methods are thread-safe."""

    __slots__ = ("_engine", "config", "devices")

    def __init__(self, engine: Engine, config: VolumeConfig, pointer: Any) -> None:
        super().__init__(pointer)
        self._engine = engine
        self.config = config
        self.devices = 0
        """ublk devices that are open on the volume: they must be closed first."""

    def close(self) -> None:
        """End connections, fail requests that wait, close the files. The log stays on disk.

        Raises CoreError (EBUSY) while a ublk device is open on the volume.
        """
        if self.devices:
            raise CoreError(_errno.EBUSY, "close", "stop or release the ublk device first")
        super().close()

    def _interrupt(self) -> None:
        if self._users:
            # Requests parked under I/O calls of other threads must come back before the handle goes.
            lib.glide_volume_fail(self._pointer, _errno.ESHUTDOWN)

    def _free(self, pointer: Any) -> None:
        check(lib.glide_volume_close(pointer), "close")

    def seal(self) -> int:
        """Close the active segment; returns the highest sealed segment (0: none)."""
        out = ffi.new("uint64_t *")
        with self._use() as volume:
            check(lib.glide_volume_seal(volume, out), "seal")
        return int(out[0])

    def sync(self) -> None:
        """Make everything acknowledged before durable on the local disk."""
        with self._use() as volume:
            check(lib.glide_volume_sync(volume), "sync")

    def committed(self, seq: int) -> None:
        """The store holds all segments up to ``seq``: flushes that wait for it return."""
        with self._use() as volume:
            check(lib.glide_volume_committed(volume, seq), "committed")

    def thin(self, seq: int) -> int:
        """Give back the space of what was written again since in a committed segment, which stays readable.

        Returns bytes; 0 if it is not worth it, or cannot be now. Raises Closed, CoreError.
        """
        with self._use() as volume:
            return check(lib.glide_volume_thin(volume, seq), "thin")

    def prepare(self) -> None:
        """Make the file of a segment to come, with its blocks, if one is wanted. Raises Closed, CoreError."""
        with self._use() as volume:
            check(lib.glide_volume_prepare(volume), "prepare")

    def retire(self, seq: int) -> None:
        """Forget and unlink all segments up to ``seq``; the reader must use a manifest with them."""
        with self._use() as volume:
            check(lib.glide_volume_retire(volume, seq), "retire")

    def resize(self, size: int) -> None:
        """Change the size in bytes; what a shrink cuts off becomes zeros."""
        with self._use() as volume:
            check(lib.glide_volume_resize(volume, size), "resize")

    def fail(self, err: int) -> None:
        """From now on all I/O fails with the positive errno ``err``, requests that wait too."""
        with self._use() as volume:
            check(lib.glide_volume_fail(volume, err), "fail")

    def stamp(self) -> int:
        """The stamp for an install that no fault asked for; take it before the manifest is read."""
        with self._use() as volume:
            return int(lib.glide_volume_stamp(volume))

    def install(self, stamp: int, answers: Sequence[Install]) -> None:
        """Answer faults, without waiting for that. Raises CoreError (ENOMEM): the pins stay with the caller.

        Answers with a stale stamp are not mapped, their waiters look again.
        """
        if not answers:
            return
        raw = ffi.new("struct glide_install[]", [msgspec.structs.astuple(answer) for answer in answers])
        with self._use() as volume:
            check(lib.glide_volume_install(volume, stamp, raw, len(answers)), "install")

    def install_holes(self, stamp: int, holes: Sequence[Holes]) -> None:
        """Say what is zero of whole pages and chunks, without waiting for that. Raises CoreError (ENOMEM).

        It answers faults on blocks that turn out to be zeros. With a stale stamp nothing lands; requests that
        ask for zeros of the chunks then look again.
        """
        if not holes:
            return
        raw = ffi.new("struct glide_holes[]", len(holes))
        for to, one in zip(raw, holes, strict=True):
            to.number = one.number
            to.kind = one.kind
            to.err = one.err
            ffi.memmove(to.zeros, one.zeros.to_bytes(GROUP // 8, "little"), GROUP // 8)
        with self._use() as volume:
            check(lib.glide_volume_install_holes(volume, stamp, raw, len(holes)), "install holes")

    def install_changed(self, ticket: int, answer: Changed | None, err: int = 0) -> None:
        """Answer a fault with this ticket, without waiting for that. Raises CoreError (ENOMEM).

        With None the requests that wait fail with the positive errno ``err``, or ask again if it is 0.
        """
        raw = ffi.new("struct glide_changed *")
        raw.ticket, raw.err = ticket, err
        edges: Sequence[int] = ()
        if answer is not None:
            raw.first, raw.end, raw.changed = answer.first, answer.end, answer.changed
            raw.last_segment, edges = answer.last_segment, answer.edges
        listed = ffi.new("uint64_t[]", list(edges))
        with self._use() as volume:
            check(lib.glide_volume_install_changed(volume, raw, listed, len(edges)), "install changes")

    def fill(self, stamp: int, fills: Sequence[Fill], *, through: bool = False) -> int:
        """Put blocks into the block cache and answer their faults; how many, from the first on.

        Blocks that the cache's disk does not take, and all with ``through``, go only to requests that wait.
        Raises CoreError if that is none, with errno EAGAIN (temporary) while every slot is pinned.
        """
        raw = ffi.new("struct glide_fill[]", len(fills))
        buffers = [ffi.from_buffer(fill.data) for fill in fills]  # kept alive over the call
        for to, fill, buffer in zip(raw, fills, buffers, strict=True):
            if len(fill.data) != BLOCK:
                raise ValueError(f"a block has {BLOCK} bytes, not {len(fill.data)}")
            to.block = fill.block
            to.key = fill.key
            to.hash = fill.hash
            to.data = buffer
        with self._use() as volume:
            return check(lib.glide_volume_fill(volume, stamp, raw, len(fills), through), "fill")

    def shadow_fill(self, block: int, count: int, data: bytearray | None) -> None:
        """Answer a ShadowFill: ``count`` blocks of 128 KiB; None lets the READs that wait go without."""
        raw = ffi.NULL if data is None else ffi.from_buffer(data)
        if data is not None and len(data) != count * BLOCK:
            raise ValueError(f"{count} blocks have {count * BLOCK} bytes, not {len(data)}")
        with self._use() as volume:
            check(lib.glide_shadow_fill(volume, block, count, raw), "shadow fill")

    def info(self) -> VolumeInfo:
        """State of the log now."""
        raw = ffi.new("struct glide_volume_info[1]")
        with self._use() as volume:
            check(lib.glide_volume_info_get(volume, raw), "info")
        return infos_from(raw)[0]

    def stats(self) -> VolumeStats:
        """Counters since open."""
        raw = ffi.new("struct glide_volume_stats[1]")
        with self._use() as volume:
            check(lib.glide_volume_stats_get(volume, raw), "stats")
        return stats_from(raw)[0]

    def pread(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes at ``offset`` (multiples of 512) as a transport would."""
        data = bytearray(length)
        self._io(lib.GLIDE_READ, 0, offset, length, ffi.from_buffer(data))
        return bytes(data)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """Write ``data`` at ``offset`` (multiples of 512) as a transport would."""
        flags = lib.GLIDE_FUA if fua else 0
        self._io(lib.GLIDE_WRITE, flags, offset, len(data), ffi.from_buffer(data))

    def zero(self, offset: int, length: int) -> None:
        """Discard or write zeroes: the range reads as zeros."""
        self._io(lib.GLIDE_ZERO, 0, offset, length, ffi.NULL)

    def flush(self) -> None:
        """What a guest's FLUSH does."""
        self._io(lib.GLIDE_FLUSH, 0, 0, 0, ffi.NULL)

    def _io(self, op: int, flags: int, offset: int, length: int, buffer: Any) -> None:
        with self._use() as volume:
            check(lib.glide_volume_io(volume, op, flags, offset, length, buffer), OPS[op])

    def attach_nbd(self, fd: int, conn_id: int, modes: NbdModes = READ_WRITE) -> None:
        """Serve NBD transmission on a connected socket; C owns ``fd`` from here, also on error.

        A CONN_CLOSED event reports its end.
        """
        try:
            pointer = self._acquire()
        except BaseException:
            os.close(fd)
            raise
        try:
            check(lib.glide_nbd_attach(pointer, fd, conn_id, modes.to_c()), "attach NBD connection")
        finally:
            self._release()

    def detach_nbd(self, conn_id: int) -> None:
        """Shut a connection down and wait until it is gone."""
        with self._use() as volume:
            check(lib.glide_nbd_detach(volume, conn_id), "detach NBD connection")

    def add_ublk(self, config: UblkConfig) -> int:
        """Make a ublk device, to be started with ``added``. Returns its id. Raises DeviceError."""
        return add_device(self, config)

    def start_ublk(self, config: UblkConfig) -> UblkDevice:
        """Add or recover a ublk device, or take what was added, and serve it. Raises DeviceError."""
        return UblkDevice(self, config)


def open_volume(
    engine: Engine, config: VolumeConfig, shadow: ShadowFile | None
) -> tuple[CoreVolume, Recovery]:
    """See :meth:`Engine.open_volume`."""
    log_dir = ffi.new("char[]", os.fsencode(config.log_dir))  # kept alive over the call
    raw = ffi.new("struct glide_volume_config *")
    raw.cookie = config.cookie
    raw.log_dir = log_dir
    ffi.memmove(raw.volume_id, config.volume_id, 16)
    ffi.memmove(raw.log_id, config.log_id, 16)
    raw.size = config.size
    raw.committed_seq = config.committed_seq
    raw.read_only = config.read_only
    raw.flush_store = config.flush_store
    raw.always_verify = config.always_verify
    raw.standby = config.standby
    raw_shadow, _kept = (ffi.NULL, None) if shadow is None else to_c(shadow)  # kept alive over the call
    raw.shadow = raw_shadow
    out, recovery = ffi.new("glide_volume **"), ffi.new("struct glide_recovery *")
    path = os.fspath(config.log_dir)
    with engine._use() as pointer:
        err = lib.glide_volume_open(pointer, raw, out, recovery)
        if err == -_errno.ENOENT:  # its first log
            os.makedirs(os.path.dirname(path), exist_ok=True)
            err = lib.glide_volume_open(pointer, raw, out, recovery)
        check(err, "open volume", path=path)
    found = Recovery(*(int(getattr(recovery, name)) for name in Recovery._fields))
    return CoreVolume(engine, config, out[0]), found
