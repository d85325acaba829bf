"""NBD as the router knows it: exports by name for the server."""

from __future__ import annotations

import threading

from glidefs.transport.base import Attachment, Endpoint
from glidefs.transport.nbd.negotiation import NbdExport
from glidefs.transport.nbd.server import NbdServer

NOTICED = 1.0
"""Seconds in which the end of a connection is noticed."""


class NbdTransport:
    """Exports by name for the NBD server. `_lock` guards the table."""

    kind = "nbd"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._exports: dict[str, NbdExport] = {}
        self._server: NbdServer | None = None

    def bind(self, server: NbdServer) -> None:
        """The server that looks exports up here; once, before the first start."""
        self._server = server

    @property
    def server(self) -> NbdServer:
        """The bound server."""
        if self._server is None:
            raise RuntimeError("the NBD transport has no server yet")
        return self._server

    def nbd_export(self, name: str) -> NbdExport | None:
        """The export of that name; the empty name means the only one there is."""
        with self._lock:
            if not name and len(self._exports) == 1:
                return next(iter(self._exports.values()))
            return self._exports.get(name)

    def nbd_exports(self) -> list[NbdExport]:
        """All of them, by name."""
        with self._lock:
            return [self._exports[name] for name in sorted(self._exports)]

    def _put(self, export: Attachment) -> None:
        entry = NbdExport(
            name=export.name,
            size=export.size,
            read_only=export.read_only,
            core=export.core,
            snapshots=export.snapshots,
        )
        with self._lock:
            self._exports[export.name] = entry

    def missing(self) -> str | None:
        """Sockets are everywhere."""
        return None

    def prepare(self, device_id: int | None) -> None:
        """Nothing is slow."""

    def start(self, export: Attachment) -> Endpoint:
        """Answer the name from now on."""
        self._put(export)
        return Endpoint(device=self.server.uri(export.name))

    def stop(self, name: str) -> None:
        """Forget the name, end its connections."""
        with self._lock:
            known = self._exports.pop(name, None)
        if known is not None and self._server is not None:
            self._server.close_export(name)

    def release(self, name: str) -> None:
        """The same: NBD clients reconnect by themselves, or not at all."""
        self.stop(name)

    def discard(self, name: str, volume_id: bytes, device_id: int) -> None:
        """Nothing is left of connections."""

    def in_use(self, name: str) -> str:
        """Connections count, whatever they do."""
        if self.server.table.is_idle(name, NOTICED):
            return ""
        peers = [connection.peer for connection in self.server.connections(name)]
        if not peers:
            return ""
        shown = ", ".join(sorted(set(peers))[:3])
        return f"{len(peers)} NBD client{'s are' if len(peers) > 1 else ' is'} connected ({shown})"

    def check_resize(self, export: Attachment, size: int) -> None:
        """Any size will do: what connections see beyond the end fails."""

    def resize(self, export: Attachment) -> str:
        """New connections see the new size; the protocol has no way to tell those that exist."""
        self._put(export)
        if self.server.connections(export.name):
            return "NBD connections that exist keep the old size until they reconnect"
        return ""
