"""What predecessor and successor tell each other, over a Unix SEQPACKET socket.

    successor                    predecessor
        hello            ──►                     versions, capabilities, which cache directory
                         ◄──     hello-ack       nothing is committed or retired from here on;
                                                 locks and listeners (descriptors)
        (opens all exports in standby, and all that it will listen on)
        ready            ──►
                         ◄──     cut-over        everything is frozen; where each log ends;
                                                 connections (descriptors)
        (brings logs up to date, recovers ublk devices, adopts connections)
        alive            ──►                     the predecessor only exits
        served           ──►                     how long guests waited, for the answer
    abort                either side, any time before alive: why; the other one ends, or goes on

How they travel, and when the other side is believed to be dead, is in `channel.py`.
"""

from __future__ import annotations

from msgspec import Struct

from glidefs.core.handoff import Connection, Position
from glidefs.errors import GlideError
from glidefs.handoff.history import Totals

VERSION = 1
"""Of the messages; a successor says which is the oldest that it speaks, too."""
CAPABILITIES = frozenset(
    {"nbd-connections", "nbd-structured", "ublk", "nbd-device", "nbd-changed", "nbd-extended", "vhost-user"}
)
"""What this program can hand over or take over; what the other side cannot, is not handed over."""


class Hello(Struct, frozen=True, tag="hello", tag_field="type"):
    """From the successor, which is `pid`: it can speak `oldest` to `version`."""

    version: int
    oldest: int
    capabilities: tuple[str, ...]
    pid: int
    cache_dir: str
    program: str


class ListenerInfo(Struct, frozen=True):
    """A listening socket, "nbd", "vhost-user" or "api"; `path` is its file, if that is ours to remove."""

    role: str
    path: str = ""


class HelloAck(Struct, frozen=True, tag="hello-ack", tag_field="type"):
    """From the predecessor. Descriptors: `locks` of them, then the listeners. `exports`: those it serves."""

    version: int
    capabilities: tuple[str, ...]
    exports: tuple[str, ...]
    locks: int
    listeners: tuple[ListenerInfo, ...]
    totals: Totals


class Ready(Struct, frozen=True, tag="ready", tag_field="type"):
    """From the successor: all exports are open in standby; `seconds` since it began with that."""

    seconds: float


class ConnectionCut(Struct, frozen=True):
    """An NBD connection; its descriptor comes in the order of the message."""

    state: Connection
    peer: str
    since: float


class ExportCut(Struct, frozen=True):
    """Where an export stood when it was frozen; `etag` and `sequence` are of its root in the store."""

    name: str
    position: Position
    etag: str | None
    sequence: int
    transport: str
    connections: tuple[ConnectionCut, ...]
    front_end: bytes = b""
    """Of vhost-user: what its transport needs to go on, and how many descriptors: those come last."""
    front_end_fds: int = 0


class CutOver(Struct, frozen=True, tag="cut-over", tag_field="type"):
    """From the predecessor, which has stopped; `frozen_at` in ns of CLOCK_MONOTONIC."""

    exports: tuple[ExportCut, ...]
    frozen_at: int


class Alive(Struct, frozen=True, tag="alive", tag_field="type"):
    """From the successor: it serves; `stall` in seconds, for NBD clients a little longer."""

    stall: float


class Served(Struct, frozen=True, tag="served", tag_field="type"):
    """From the successor: no guest waits any more, the last one waited `stall` seconds."""

    stall: float


class Abort(Struct, frozen=True, tag="abort", tag_field="type"):
    """From either: nothing comes of it, and why."""

    reason: str


Message = Hello | HelloAck | Ready | CutOver | Alive | Served | Abort


class ProtocolError(GlideError):
    """The other process said what this one does not understand."""


def common_version(hello: Hello) -> int:
    """The version to speak with a successor. Raises ProtocolError if there is none."""
    if hello.oldest > VERSION or hello.version < VERSION:
        raise ProtocolError(
            f"{hello.program} speaks handoff versions {hello.oldest} to {hello.version}, this one {VERSION}; "
            "stop this daemon and start the other one"
        )
    return VERSION
