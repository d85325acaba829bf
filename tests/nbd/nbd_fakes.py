"""Stand-ins for the router and the core, for tests of the handshake alone."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

from nbd_client import RawClient

from glidefs.config import NbdSettings
from glidefs.core.volume import NbdModes
from glidefs.transport.nbd.negotiation import NbdExport
from glidefs.transport.nbd.server import HandshakeLimits, NbdServer

GIB = 1 << 30


class FakeSnapshots:
    """Snapshots of an export; with `fail` the store is away. `asked` counts questions."""

    def __init__(self, *sequences: int) -> None:
        self.sequences = sequences
        self.fail: Exception | None = None
        self.gate: threading.Event | None = None
        self.entered = threading.Event()
        self.asked = 0

    def listed(self) -> tuple[int, ...]:
        self._ask()
        return self.sequences

    def has(self, sequence: int) -> bool:
        self._ask()
        return sequence in self.sequences

    def _ask(self) -> None:
        self.asked += 1
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.fail is not None:
            raise self.fail


class FakeCore:
    """Keeps what it is given; `fail` makes it refuse, `gate` makes it wait."""

    def __init__(self) -> None:
        self.attached: dict[int, tuple[socket.socket, bool]] = {}
        self.modes: dict[int, NbdModes] = {}
        self.detached: list[int] = []
        self.fail: Exception | None = None
        self.gate: threading.Event | None = None
        self.entered = threading.Event()
        self._changed = threading.Condition()

    def attach_nbd(self, fd: int, conn_id: int, modes: NbdModes) -> None:
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.fail is not None:
            os.close(fd)
            raise self.fail
        with self._changed:
            self.attached[conn_id] = (socket.socket(fileno=fd), modes.read_only)
            self.modes[conn_id] = modes
            self._changed.notify_all()

    def detach_nbd(self, conn_id: int) -> None:
        with self._changed:
            self.attached.pop(conn_id)[0].close()
            self.detached.append(conn_id)

    def wait_attached(self, count: int = 1) -> list[int]:
        """Connection ids, once there are that many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.attached) >= count, 20)
            return list(self.attached)

    def close(self) -> None:
        for connection, _ in self.attached.values():
            connection.close()


class Exports:
    """A table of exports."""

    def __init__(self, *exports: NbdExport) -> None:
        self.table = {export.name: export for export in exports}

    def nbd_export(self, name: str) -> NbdExport | None:
        return self.table.get(name)

    def nbd_exports(self) -> list[NbdExport]:
        return list(self.table.values())


class Bench:
    """A server with two exports on a fake core."""

    def __init__(self, directory: Path, limits: HandshakeLimits | None = None) -> None:
        self.path = str(directory / "run" / "nbd.sock")
        self.core = FakeCore()
        self.snapshots = FakeSnapshots(3, 17, 2**64 - 1)
        self.disk = NbdExport(
            name="disk", size=GIB, read_only=False, core=self.core, snapshots=self.snapshots
        )
        self.base = NbdExport(name="base", size=2 * GIB, read_only=True, core=self.core)
        self.exports = Exports(self.disk, self.base)
        self.server = NbdServer(NbdSettings(socket=self.path), self.exports, limits=limits)

    def connect(self) -> RawClient:
        return RawClient(self.path)

    def close(self) -> None:
        self.server.close()
        self.core.close()
