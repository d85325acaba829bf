"""Moves exports between processes: freezes, describes and releases them, or takes them over.

The same class serves either side. Neither decides anything here: `predecessor.py` and `successor.py` do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

from glidefs.core import handoff, ublk
from glidefs.core.engine import Engine
from glidefs.core.handoff import Connection, Position
from glidefs.errors import DeviceError, GlideError
from glidefs.exports.router import ExportRouter
from glidefs.exports.table import Entry
from glidefs.handoff.protocol import CAPABILITIES, ConnectionCut, ExportCut
from glidefs.host.host import Host
from glidefs.transport.nbd.connections import NbdConnection
from glidefs.transport.nbd.server import NbdServer
from glidefs.transport.vhost_user.transport import VhostUserTransport
from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

F_PER_IO_DAEMON = 1 << 13
"""UBLK_F_PER_IO_DAEMON: a slot belongs to a thread, not a queue; Linux 6.16."""
THREADS = 8
NEGOTIATION = 1.0
"""Seconds that NBD clients have to end their handshake before the freeze."""


class HandoffCoordinator:
    """``entries``: the exports that move; their locks are held by the caller."""

    def __init__(
        self,
        router: ExportRouter,
        host: Host,
        engine: Engine,
        server: NbdServer,
        vhost: VhostUserTransport,
        entries: Sequence[Entry],
    ) -> None:
        self._router = router
        self._host = host
        self._engine = engine
        self._server = server
        self._vhost = vhost
        self.entries = list(entries)
        self._threads = _Threads(len(self.entries))
        self._positions: dict[str, Position] = {}

    def _volumes(self) -> list[tuple[Entry, Volume]]:
        return [(entry, entry.volume) for entry in self.entries if entry.volume is not None]

    # -- the predecessor -------------------------------------------------------------------------

    def sync_all(self) -> None:
        """Make logs durable while guests go on: little is left for the first FLUSH of the successor."""
        self._threads.each(lambda pair: pair[1].core.sync(), self._volumes())

    def pause_listeners(self) -> None:
        """New clients wait in the kernel; NBD's that negotiate get a moment to end it."""
        self._vhost.pause()
        self._server.pause(NEGOTIATION)

    def freeze_all(self) -> None:
        """Guests wait from here on. Nothing is written any more to logs and block cache."""
        self.set_all_logs_freeze(frozen=True)
        handoff.give_cache(self._engine)

    def set_all_logs_freeze(self, *, frozen: bool) -> None:
        """Freeze or unfreeze the volumes only."""
        if frozen:
            self._positions = dict(
                self._threads.each(lambda pair: (pair[0].name, handoff.freeze(pair[1].core)), self._volumes())
            )
            return
        self._threads.each(lambda pair: handoff.unfreeze(pair[1].core), self._volumes())

    def unfreeze_all(self) -> None:
        """The handoff was called off before the cut-over: go on as if nothing had been."""
        handoff.take_cache(self._engine)
        self.set_all_logs_freeze(frozen=False)
        self._server.resume()
        self._vhost.resume()

    def snapshot(self, capabilities: frozenset[str] = CAPABILITIES) -> tuple[list[ExportCut], list[int]]:
        """Where every export stands now that all are frozen, and the sockets of their connections, in order.

        Behind those are the descriptors of vhost-user front-ends.

        The descriptors are the caller's. Raises GlideError for an export that was fenced meanwhile, and for a
        connection that a successor with these capabilities cannot go on with.
        """
        cuts: list[ExportCut] = []
        sockets: list[int] = []
        behind: list[int] = []
        for entry, volume in self._volumes():
            if volume.fenced:  # since the successor read the records: it would serve the volume
                close_all(sockets + behind)
                raise GlideError(f"{entry.name} was fenced meanwhile: {volume.fenced}")
            connections = []
            for fd, state in [] if _has_device(entry) else handoff.connections(volume.core):
                about = self._server.table.about(state.conn_id)
                if about is None:
                    continue  # it has ended, and the event is on its way
                beyond = _beyond(state, capabilities)
                if beyond:
                    close_all(sockets + behind)
                    raise GlideError(
                        f"the other program cannot go on with the NBD connection of {about.peer} to "
                        f"{entry.name}, which {beyond}; end it, or stop this daemon and start the other one"
                    )
                sockets.append(os.dup(fd))
                connections.append(ConnectionCut(state, about.peer, about.since))
            front_end, fds = self._front_end(entry)
            behind += fds
            if front_end and "vhost-user" not in capabilities:
                close_all(sockets + behind)
                raise GlideError(
                    f"the other program cannot go on with the vhost-user front-end of {entry.name}; end it, "
                    "or stop this daemon and start the other one"
                )
            cuts.append(
                ExportCut(
                    name=entry.name,
                    position=self._positions[entry.name],
                    etag=volume.etag,
                    sequence=volume.root.sequence,
                    transport=entry.transport.kind if entry.transport else "",
                    connections=tuple(connections),
                    front_end=front_end,
                    front_end_fds=len(fds),
                )
            )
        return cuts, sockets + behind

    def _front_end(self, entry: Entry) -> tuple[bytes, list[int]]:
        return self._vhost.hand_over(entry.name) if _is(entry, "vhost-user") else (b"", [])

    def has_devices(self) -> bool:
        """Whether a ublk device is among the exports: then the successor waits for this process to let go."""
        return any(_has_device(entry) for entry in self.entries)

    def take_ublk_server(self) -> None:
        """Let go of the ublk devices and the NBD connections, without a word to guests or the disk.

        Before Linux 6.16 a device can be recovered only when the threads that served it have ended. Guests
        wait for this; what only this process needs, if it is to go on, is :meth:`forget`.
        """
        handoff.end_cache(self._engine)
        self._server.forget()
        self._vhost.forget()
        self._engine.end_workers()

    def forget(self) -> None:
        """Close all that was let go. Waits for no thread that may wait for the store."""
        self._router.abandon()
        self._engine.shutdown()
        self._server.close(handed_over=True)
        self._engine.close()

    # -- the successor -----------------------------------------------------------------------------

    def recover_handoff_devices(self, cuts: Sequence[ExportCut], sockets: list[int]) -> None:
        """Bring the volumes, open in standby, up to date, recover the ublk devices and adopt connections.

        Guests of a device go on as soon as theirs is recovered, NBD clients with :meth:`go_on`. Raises
        DeviceError, and GlideError where a volume is not what it was: then this process must end.
        """
        devices_first = sorted(cuts, key=lambda cut: cut.transport != "ublk")  # theirs is the longest way
        front_ends = _front_ends(cuts, sockets)
        steps: list[Callable[[], None]] = [
            partial(self._take_up, cut, front_ends[cut.name]) for cut in devices_first
        ]
        steps.append(partial(self.adopt_connections, cuts, sockets))
        self._threads.each(_run, steps)

    def _take_up(self, cut: ExportCut, front_end: list[int]) -> None:
        entry = self.get_handler_sync(cut.name)
        volume = entry.volume
        assert volume is not None
        if (volume.etag, volume.root.sequence) != (cut.etag, cut.sequence):
            raise GlideError(
                f"{cut.name}: its root here is number {volume.root.sequence}, not {cut.sequence}"
            )
        self._router.opener.take_up(entry, cut.position)
        if cut.transport == "ublk":
            handoff.unfreeze(volume.core)  # the kernel has what guests asked for meanwhile
        self._router.opener.guests.start(entry)
        if cut.front_end:
            self._adopt_front_end(cut, front_end)

    def _adopt_front_end(self, cut: ExportCut, descriptors: list[int]) -> None:
        """Its volume is frozen. One that cannot be adopted is cut off: it connects again."""
        try:
            self._vhost.take_over(cut.name, cut.front_end, descriptors)
        except (GlideError, OSError) as error:
            log.error("%s: its vhost-user front-end was lost: %s", cut.name, error)

    def adopt_connections(
        self, cuts: Iterable[ExportCut], sockets: list[int], *, kernel: bool = True
    ) -> None:
        """The NBD connections belong to the volumes, which are frozen still. ``sockets`` is used up.

        Without ``kernel`` those of its driver are closed: it may have asked for the same over another one by
        now, and asks again for what has no answer.
        """
        for cut in cuts:
            volume = self.get_handler_sync(cut.name).volume
            assert volume is not None
            for connection in cut.connections:
                fd = sockets.pop(0)
                state = connection.state
                if state.kernel and not kernel:
                    os.close(fd)
                    continue
                self._server.table.adopt(
                    NbdConnection(
                        state.conn_id, cut.name, connection.peer, state.read_only, connection.since
                    ),
                    volume.core,
                )
                handoff.adopt(volume.core, fd, state)

    def readopt(self, cuts: Iterable[ExportCut], sockets: list[int]) -> None:
        """After the revival: give the volumes, which are served again, the connections that they had."""
        mine = {entry.name: entry for entry in self.entries}
        cuts = list(cuts)
        front_ends = _front_ends(cuts, sockets)
        for cut in cuts:
            own, sockets = sockets[: len(cut.connections)], sockets[len(cut.connections) :]
            entry = mine.get(cut.name)
            if entry is None or entry.volume is None:
                close_all([*own, *front_ends[cut.name]])
            elif own or cut.front_end:
                handoff.freeze(entry.volume.core)
                self.adopt_connections([cut], own, kernel=False)
                if cut.front_end:
                    self._adopt_front_end(cut, front_ends[cut.name])
                handoff.unfreeze(entry.volume.core)
        self._vhost.resume()

    def go_on(self) -> None:
        """All guests are served from here on."""
        waiting = [pair for pair in self._volumes() if not _has_device(pair[0])]
        self._threads.each(lambda pair: handoff.unfreeze(pair[1].core), waiting)
        handoff.take_cache(self._engine)

    # -- both ----------------------------------------------------------------------------------------

    def get_handler_sync(self, name: str) -> Entry:
        """The export of that name among those that move. Raises GlideError."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise GlideError(f"{name} is not among the exports that move")

    @staticmethod
    def is_per_io_daemon_supported() -> bool:
        """Whether the kernel's ublk driver lets a device go before the threads that served it have ended."""
        try:
            return bool(ublk.features() & F_PER_IO_DAEMON)
        except DeviceError:
            return False


def _is(entry: Entry, kind: str) -> bool:
    return entry.transport is not None and entry.transport.kind == kind


def _has_device(entry: Entry) -> bool:
    return _is(entry, "ublk")


def _beyond(connection: Connection, capabilities: frozenset[str]) -> str:
    """What of a connection a process with these capabilities does not know; empty: nothing."""
    if connection.structured and "nbd-structured" not in capabilities:
        return "has structured replies"
    if connection.kernel and "nbd-device" not in capabilities:
        return "is the kernel's"
    if connection.changed and "nbd-changed" not in capabilities:
        return "has contexts of snapshots"
    if connection.extended and "nbd-extended" not in capabilities:
        return "has extended headers"
    return ""


def _front_ends(cuts: Sequence[ExportCut], sockets: list[int]) -> dict[str, list[int]]:
    """Takes the descriptors of vhost-user front-ends, by export, off the end of all."""
    at = sum(len(cut.connections) for cut in cuts)
    behind = sockets[at:]
    del sockets[at:]
    found: dict[str, list[int]] = {}
    for cut in cuts:
        found[cut.name], behind = behind[: cut.front_end_fds], behind[cut.front_end_fds :]
    return found


def _run(step: Callable[[], None]) -> None:
    step()


def close_all(descriptors: Iterable[int]) -> None:
    """Close them; errors do not matter."""
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)


class _Threads:
    """Threads that are there before guests wait for what they do. With one export there are none."""

    def __init__(self, exports: int) -> None:
        count = min(THREADS, exports)
        self._pool = ThreadPoolExecutor(count, "handoff") if count > 1 else None
        if self._pool is not None:
            there = threading.Barrier(count)
            wait([self._pool.submit(there.wait) for _ in range(count)])

    def each(self, action: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Run ``action`` for all, side by side. When all have ended raises what the first of them raised."""
        if self._pool is None or len(items) <= 1:
            return [action(item) for item in items]
        futures = [self._pool.submit(partial(action, item)) for item in items]
        wait(futures)
        return [future.result() for future in futures]
