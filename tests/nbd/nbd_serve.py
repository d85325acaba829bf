"""The C core behind a real NBD server, with no store: every fault is answered with zeros.

So a volume is empty at first and holds exactly what clients wrote, all of it in the write log.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from glidefs.config import NbdSettings
from glidefs.core.check import Closed
from glidefs.core.engine import Engine, EngineConfig, EventKind, Fault
from glidefs.core.volume import (
    GROUP,
    Changed,
    CoreVolume,
    VolumeConfig,
    holes_error,
    install_zero,
    page_holes,
)
from glidefs.transport.nbd.negotiation import NbdExport
from glidefs.transport.nbd.server import NbdServer

MIB = 1 << 20
_POLL_MS = 50


class Served:
    """Engine, volumes and server; clear `answering` to leave readers of absent blocks waiting."""

    def __init__(
        self, directory: Path, *, log_limit: int = 8 << 30, segment_bytes: int = 8 * MIB, **config: Any
    ) -> None:
        self.directory = directory
        self.path = str(directory / "nbd.sock")
        self.engine = Engine(
            EngineConfig(
                cache_dir=directory / "blocks",
                workers=2,
                segment_bytes=segment_bytes,
                log_limit=log_limit,
                map_budget=256 * MIB,
                cache_bytes=16 * MIB,
                **config,
            )
        )
        self.volumes: dict[int, CoreVolume] = {}
        self.exports: dict[str, NbdExport] = {}
        self.windows: Callable[[Fault], Changed | int] = lambda fault: errno.ENOENT
        """What changed since a snapshot, or the errno of the answer."""
        self.answering = threading.Event()
        self.answering.set()
        self.problems: list[BaseException] = []
        self._stopping = False
        self.server = NbdServer(NbdSettings(socket=self.path, listen="127.0.0.1:0"), self)
        self.server.start()
        self._threads = [
            threading.Thread(target=self._guard, args=(run,)) for run in (self._faults, self._events)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def nbd_export(self, name: str) -> NbdExport | None:
        return self.exports.get(name)

    def nbd_exports(self) -> list[NbdExport]:
        return list(self.exports.values())

    def add(self, name: str, size: int, *, read_only: bool = False) -> CoreVolume:
        """Serve a new empty volume."""
        cookie = len(self.volumes) + 1
        identity = cookie.to_bytes(16, "big")
        config = VolumeConfig(
            cookie=cookie,
            log_dir=self.directory / "logs" / name,
            volume_id=identity,
            log_id=identity,
            size=size,
        )
        core, _ = self.engine.open_volume(config)
        self.volumes[cookie] = core
        self.exports[name] = NbdExport(name=name, size=size, read_only=read_only, core=core)
        return core

    @property
    def tcp(self) -> tuple[str, int]:
        """Where the server listens on TCP."""
        host, port = self.server.listeners[1].getsockname()
        return host, port

    def _guard(self, run: Callable[[], None]) -> None:
        try:
            while not self._stopping:
                run()
        except Closed:
            pass
        except BaseException as error:
            self.problems.append(error)
            raise

    def _faults(self) -> None:
        fault = self.engine.faults_next(1 << 16, _POLL_MS)
        if fault is None:
            return
        self.answering.wait()
        with contextlib.suppress(Closed):  # the volume: its requests were failed
            core = self.volumes[fault.volume]
            if fault.ticket:
                answer = self.windows(fault)
                told, err = (None, answer) if isinstance(answer, int) else (answer, 0)
                core.install_changed(fault.ticket, told, err)
            elif fault.chunks:
                core.install_holes(fault.stamp, [page_holes(fault.block // GROUP // GROUP, (1 << GROUP) - 1)])
                core.install_holes(fault.stamp, [holes_error(fault.block // GROUP, 0)])
            else:
                core.install(fault.stamp, [install_zero(fault.block, fault.count)])

    def _events(self) -> None:
        for event in self.engine.events_next(_POLL_MS):
            if event.kind == EventKind.CONN_CLOSED:
                self.server.connection_closed(event.a, event.b)

    def close(self) -> None:
        """End everything, in the order of the daemon; fails the test if a thread failed."""
        self.answering.set()
        self.server.close()
        stats = self.engine.stats()
        self._stopping = True
        for thread in self._threads:
            thread.join(20)
        for core in self.volumes.values():
            core.close()
        self.engine.close()
        assert not self.problems, self.problems
        assert (stats.nbd_replies, stats.nbd_payloads) == (0, 0)  # all that connections held was given back
