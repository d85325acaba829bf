"""The table of NBD connections: which clients are served, and how their connections end.

One lock guards it, never held across a call to the export look-up or to the core, both of which may
wait. A record is ATTACHING while the core takes the socket and ATTACHED until the core reports the
end. Whoever removes an export bumps a count, and an attach that looked the name up before that
looks again: no connection slips in behind a removal.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import secrets
import socket
import threading
import time
from typing import TYPE_CHECKING

from msgspec import Struct

from glidefs.core.check import Closed
from glidefs.core.volume import NbdModes
from glidefs.errors import GlideError
from glidefs.transport.nbd.negotiation import Chosen, ExportLookup, NbdExport

if TYPE_CHECKING:
    from glidefs.core.volume import CoreVolume

log = logging.getLogger(__name__)


class NbdConnection(Struct, frozen=True):
    """A connection in transmission, for status."""

    conn_id: int
    export: str
    peer: str
    read_only: bool
    since: float  # seconds since the epoch


class Paused(GlideError):
    """Connections are about to move to another process."""


class _Record:
    def __init__(self, about: NbdConnection, core: CoreVolume) -> None:
        self.about = about
        self.core = core
        self.attached = False


class ConnectionTable:
    """Connections by id. Ids are unique across processes that hand connections to each other."""

    def __init__(self, exports: ExportLookup) -> None:
        self._exports = exports
        self._changed = threading.Condition()  # guards the rest
        self._records: dict[int, _Record] = {}
        self._removals = 0
        self._closing = False
        self._paused = False
        self._ids = itertools.count((secrets.randbits(30) << 32) + 1)

    def pause(self, paused: bool) -> None:
        """Whether :meth:`serve` takes none for now: connections are about to move."""
        with self._changed:
            self._paused = paused

    def attach(self, connection: socket.socket, outcome: Chosen, peer: str) -> None:
        """Give a socket whose handshake is over to the core, or hang up. Closes this copy of it."""
        chosen = outcome.export
        with connection:
            try:
                record = self._register(chosen, peer)
            except Exception:
                log.exception("looking up export %s failed", chosen.name)
                return
            if record is None:
                log.info("export %s went away while %s connected", chosen.name, peer)
                _hang_up(connection)
                return
            conn_id = record.about.conn_id
            try:
                connection.setblocking(True)
                chosen.core.attach_nbd(os.dup(connection.fileno()), conn_id, outcome.modes)
            except Exception as error:
                log.info("export %s does not take the connection of %s: %s", chosen.name, peer, error)
                _hang_up(connection)
                self._drop(conn_id)
                return
            with self._changed:
                record.attached = True
                self._changed.notify_all()

    def serve(
        self, connection: socket.socket, name: str, core: CoreVolume, *, read_only: bool, peer: str
    ) -> int:
        """Give the core a socket whose other end is the kernel's driver. Returns its id.

        Closes this copy of it. Raises Closed, CoreError; Paused: try again later.
        """
        with connection:
            with self._changed:
                if self._closing:
                    raise Closed("no connection is taken any more")
                if self._paused:
                    raise Paused("a handoff is under way")
                about = NbdConnection(next(self._ids), name, peer, read_only, time.time())
                record = self._records[about.conn_id] = _Record(about, core)
            try:
                modes = NbdModes(read_only=read_only, kernel=True)
                core.attach_nbd(os.dup(connection.fileno()), about.conn_id, modes)
            except BaseException:
                self._drop(about.conn_id)
                raise
            with self._changed:
                record.attached = True
                self._changed.notify_all()
        return about.conn_id

    def _register(self, chosen: NbdExport, peer: str) -> _Record | None:
        """A new record, if the export is still the one that the client was told about."""
        while True:
            with self._changed:
                removals = self._removals
            if self._exports.nbd_export(chosen.name) != chosen:
                return None
            with self._changed:
                if self._closing:
                    return None
                if self._removals != removals:
                    continue
                about = NbdConnection(next(self._ids), chosen.name, peer, chosen.read_only, time.time())
                record = self._records[about.conn_id] = _Record(about, chosen.core)
                return record

    def _drop(self, conn_id: int) -> NbdConnection | None:
        with self._changed:
            record = self._records.pop(conn_id, None)
            self._changed.notify_all()
        return record.about if record is not None else None

    def ended(self, conn_id: int, err: int) -> NbdConnection | None:
        """The core reports the end of a connection: which one it was, None if it is not known."""
        about = self._drop(conn_id)
        if about is not None and err == errno.ETIME:
            log.warning(
                "export %s: NBD client %s was cut off: it took no reply, or left a write unfinished, for "
                "[nbd] stall_timeout; see what it waits for and let it connect again",
                about.export,
                about.peer,
            )
        elif about is not None:
            why = f": {os.strerror(err)}" if err else ""
            log.debug("NBD connection %d of %s to %s ended%s", conn_id, about.peer, about.export, why)
        return about

    def listing(self, name: str | None = None) -> list[NbdConnection]:
        """Connections of one export, or of all."""
        with self._changed:
            records = list(self._records.values())
        return [record.about for record in records if name in (None, record.about.export)]

    def is_idle(self, name: str, seconds: float) -> bool:
        """Whether an export has no connection, at the latest in so many seconds: an end is noticed late."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(record.about.export != name for record in self._records.values()), seconds
            )

    def detach(self, name: str | None = None) -> None:
        """End every connection of an export, or of all exports and for good. Returns when they are gone."""
        with self._changed:
            self._removals += 1
            self._closing = self._closing or name is None
            mine = [record for record in self._records.values() if name in (None, record.about.export)]
            self._changed.wait_for(lambda: all(record.attached or self._is_gone(record) for record in mine))
            attached = [record for record in mine if not self._is_gone(record)]
        for record in attached:
            self._end(record)

    def end(self, conn_id: int) -> None:
        """End one connection that :meth:`serve` began. Returns when it is gone."""
        with self._changed:
            record = self._records.get(conn_id)
        if record is not None:
            self._end(record)

    def _end(self, record: _Record) -> None:
        # It may have ended by itself, or its volume may be closed: the goal in either case.
        with contextlib.suppress(Exception):
            record.core.detach_nbd(record.about.conn_id)
        self._drop(record.about.conn_id)

    def _is_gone(self, record: _Record) -> bool:
        return record.about.conn_id not in self._records

    def about(self, conn_id: int) -> NbdConnection | None:
        """What is known about a connection."""
        with self._changed:
            record = self._records.get(conn_id)
        return record.about if record is not None else None

    def adopt(self, about: NbdConnection, core: CoreVolume) -> None:
        """A connection came from another process, and the core has it."""
        record = _Record(about, core)
        record.attached = True
        with self._changed:
            self._records[about.conn_id] = record

    def settled(self, seconds: float) -> bool:
        """Wait until the core has every connection whose handshake is over; False when time is up."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(record.attached for record in self._records.values()), seconds
            )

    def forget(self) -> None:
        """Leave every connection to another process and take no more."""
        with self._changed:
            self._closing = True
            self._records.clear()
            self._changed.notify_all()


def _hang_up(connection: socket.socket) -> None:
    """End the conversation even if the core kept a duplicate of the descriptor."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
