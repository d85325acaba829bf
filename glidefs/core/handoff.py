"""Volumes and connections that move from one process to another; see "handoff" in csrc/glide_core.h.

The old process: :func:`freeze`, :func:`connections`, then :func:`unfreeze`, or closing the volume. The
new one: a volume opened in standby, :func:`activate`, :func:`adopt`, :func:`unfreeze`.
"""

from __future__ import annotations

import contextlib
import errno
from typing import Any

import msgspec

from glidefs.core._core import ffi, lib
from glidefs.core.check import CoreError, check
from glidefs.core.engine import Engine
from glidefs.core.volume import CoreVolume, NbdModes, Recovery

_MANY = 1024


class Position(msgspec.Struct, frozen=True):
    """How far a log goes: its live segments (0, 0: none) and the records of the last one."""

    first_seq: int
    last_seq: int
    last_end: int


class Connection(msgspec.Struct, frozen=True):
    """An NBD connection of a frozen volume.

    ``received``: bytes that the new process receives before those of the socket, then it throws ``skip``
    bytes away; ``unsent``: bytes that it sends first. ``structured`` and what follows as in
    :class:`glidefs.core.volume.NbdModes`; a process that does not know them takes no such connection over.
    """

    conn_id: int
    read_only: bool
    skip: int
    received: bytes
    unsent: bytes
    structured: bool = False
    allocation: bool = False
    kernel: bool = False
    changed: tuple[int, ...] = ()
    extended: bool = False

    @property
    def modes(self) -> NbdModes:
        """What its handshake came to."""
        return NbdModes(
            self.read_only, self.structured, self.allocation, self.kernel, self.changed, self.extended
        )


def freeze(volume: CoreVolume) -> Position:
    """Let nothing begin on the volume any more; what guests ask for is parked."""
    raw = ffi.new("struct glide_cutover *")
    with volume._use() as pointer:
        check(lib.glide_volume_freeze(pointer, raw), "freeze")
    return Position(int(raw.first_seq), int(raw.last_seq), int(raw.last_end))


def unfreeze(volume: CoreVolume) -> None:
    """Go on, with what was parked first."""
    with volume._use() as pointer:
        check(lib.glide_volume_unfreeze(pointer), "unfreeze")


def activate(volume: CoreVolume, expected: Position) -> Recovery:
    """Replay what came since the volume was opened in standby; it stays frozen.

    Raises CoreError (ESTALE) if the log does not end where ``expected`` says, CorruptLog.
    """
    raw = ffi.new("struct glide_cutover *", (expected.first_seq, expected.last_seq, expected.last_end))
    recovery = ffi.new("struct glide_recovery *")
    with volume._use() as pointer:
        path = str(volume.config.log_dir)
        check(lib.glide_volume_activate(pointer, raw, recovery), "activate volume", path=path)
    return Recovery(*(int(getattr(recovery, name)) for name in Recovery._fields))


def connections(volume: CoreVolume) -> list[tuple[int, Connection]]:
    """The NBD connections of a frozen volume, each with its descriptor, which stays the core's."""
    while True:
        with contextlib.suppress(_Changed), volume._use() as pointer:
            states, count = _states(pointer)
            return [_exported(pointer, ffi.addressof(states, i)) for i in range(count)]


class _Changed(Exception):
    """Something that was under way when the volume was frozen has ended meanwhile, or a client has left."""


def _states(pointer: Any) -> tuple[Any, int]:
    room = _MANY
    while True:
        raw = ffi.new("struct glide_nbd_state[]", room)
        count = check(lib.glide_nbd_frozen(pointer, raw, room), "list connections")
        if count <= room:
            return raw, count
        room = count


def _exported(pointer: Any, state: Any) -> tuple[int, Connection]:
    received, unsent = bytearray(state.in_bytes), bytearray(state.out_bytes)
    into, out = ffi.from_buffer(received), ffi.from_buffer(unsent)
    try:
        check(lib.glide_nbd_export(pointer, state, into, out), "export connection")
    except CoreError as error:
        if error.errno in (errno.EAGAIN, errno.ENOENT):
            raise _Changed from error
        raise
    modes = state.handshake.modes
    connection = Connection(
        int(state.conn_id),
        bool(modes & lib.GLIDE_NBD_READ_ONLY),
        int(state.skip),
        bytes(received),
        bytes(unsent),
        bool(modes & lib.GLIDE_NBD_STRUCTURED),
        bool(modes & lib.GLIDE_NBD_ALLOCATION),
        bool(modes & lib.GLIDE_NBD_KERNEL),
        tuple(int(state.handshake.changed[i]) for i in range(state.handshake.snapshots)),
        bool(modes & lib.GLIDE_NBD_EXTENDED),
    )
    return int(state.fd), connection


def adopt(volume: CoreVolume, fd: int, connection: Connection) -> None:
    """Serve such a connection once the volume is unfrozen. C owns ``fd`` from here, also on error."""
    raw = ffi.new("struct glide_nbd_state *")
    raw.conn_id = connection.conn_id
    raw.handshake = connection.modes.to_c()[0]
    raw.skip = connection.skip
    raw.in_bytes = len(connection.received)
    raw.out_bytes = len(connection.unsent)
    received, unsent = ffi.from_buffer(connection.received), ffi.from_buffer(connection.unsent)
    with volume._use() as pointer:
        check(lib.glide_nbd_adopt(pointer, fd, raw, received, unsent), "adopt NBD connection")


def give_cache(engine: Engine) -> None:
    """From the return on this process does not write the files of the block cache: fills wait."""
    with engine._use() as pointer:
        check(lib.glide_cache_give(pointer), "give the block cache away")


def end_cache(engine: Engine) -> None:
    """It will not be taken back: fills that wait for that end."""
    with engine._use() as pointer:
        lib.glide_cache_shutdown(pointer)


def take_cache(engine: Engine) -> None:
    """The files of the block cache are this process's. Raises CoreError (ENOSPC)."""
    with engine._use() as pointer:
        check(lib.glide_cache_take(pointer), "take the block cache")
