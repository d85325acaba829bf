"""Nodes with a router on the real core, over one store in memory that remembers what was asked of it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stored_roots import owner_of

from glidefs.bases.manifest_cache import BaseLibrary
from glidefs.core.engine import Engine, EngineConfig
from glidefs.core.volume import CoreVolume
from glidefs.exports.requests import AttachRequest, CreateRequest, ExportStatus, PromoteRequest
from glidefs.exports.router import ExportRouter
from glidefs.exports.settings import RouterSettings
from glidefs.host.host import Host
from glidefs.manifest.lease import Owner
from glidefs.store.base import Object
from glidefs.store.memory import MemoryStore
from glidefs.store.resilient import ResilientStore
from glidefs.transport.base import Attachment, Endpoint
from glidefs.volume.settings import HostSettings

PREFIX = "default"
MIB = 1 << 20
BLOCK = 131072

faulthandler.enable()


class CountingStore(MemoryStore):
    """``gets`` are the keys of whole-object reads in order; ``most`` is how many ran at once."""

    def __init__(self) -> None:
        super().__init__()
        self.gets: list[str] = []
        self.most = 0
        self._running = 0
        self._counting = threading.Lock()

    def get(self, key: str) -> Object:
        with self._counting:
            self.gets.append(key)
            self._running += 1
            self.most = max(self.most, self._running)
        try:
            return super().get(key)
        finally:
            with self._counting:
                self._running -= 1

    def total(self) -> int:
        return sum(self.requests.values())


class NoGuests:
    """A transport that nobody connects to: tests talk to the core."""

    kind = "nbd"

    def __init__(self) -> None:
        self.guests: dict[str, str] = {}
        """Who uses an export, as the test has it."""

    def missing(self) -> str | None:
        return None

    def prepare(self, device_id: int | None) -> None:
        pass

    def start(self, export: Attachment) -> Endpoint:
        return Endpoint(device=f"none://{export.name}")

    def stop(self, name: str) -> None:
        pass

    def release(self, name: str) -> None:
        pass

    def discard(self, name: str, volume_id: bytes, device_id: int) -> None:
        pass

    def in_use(self, name: str) -> str:
        return self.guests.get(name, "")

    def check_resize(self, export: Attachment, size: int) -> None:
        pass

    def resize(self, export: Attachment) -> str:
        return ""


class Node:
    """One host's router."""

    def __init__(
        self,
        home: Path,
        memory: MemoryStore,
        *,
        grace: float = 86400.0,
        owner: Owner | None = None,
        logs_missing: str = "",
        **settings: Any,
    ) -> None:
        self.home = home
        (home / "exports").mkdir(parents=True, exist_ok=True)
        self.stopping = threading.Event()
        self.store = ResilientStore(memory, probe_every=0.05, cancel=self.stopping)
        self.engine = Engine(
            EngineConfig(
                cache_dir=home / "blocks",
                workers=2,
                segment_bytes=settings.pop("segment_bytes", 4 * MIB),
                log_limit=512 * MIB,
                map_budget=64 * MIB,
                cache_bytes=settings.pop("cache_bytes", 64 * MIB),
                read_timeout_ms=settings.pop("read_timeout_ms", 0),
            )
        )
        options: dict[str, Any] = {
            "log_dir": home / "logs",
            "reader_threads": 4,
            "fetch_threads": 4,
            "prefetch_threads": 2,
            "poll_ms": 20,
            "store_patience": 0.5,
            "sync_interval": 3600.0,
            "max_dirty_age": 3600.0,
            "pack_bytes": 2 * MIB,
            "compaction": False,
            "gc_grace": grace,
            "shadow_dir": home / "shadow" if os.environ.get("GLIDEFS_TEST_SHADOW") else None,
        }
        options.update(settings)
        self.host = Host(
            self.engine,
            self.store,
            state_dir=home / "state",
            settings=HostSettings(**options),
        )
        self.host.start()
        self.bases = BaseLibrary(self.store, grace=grace, stopping=self.stopping)
        places = RouterSettings(
            owner=owner or owner_of(home.name),
            exports_dir=home / "exports",
            state_dir=home / "state",
            logs_dir=home / "logs",
            prefixes=(PREFIX,),
            logs_missing=logs_missing,
        )
        self.transport = NoGuests()
        self.router = ExportRouter(
            self.host, self.store, (self.transport,), places, self.bases, self.stopping
        )

    def close(self) -> None:
        for volume in self.host.volumes():
            assert not volume.core.stats().shadow_differences
        self.router.close()
        self.host.close()
        self.engine.close()
        self.store.close()

    # -- shortcuts -------------------------------------------------------------------------------

    def create(self, name: str, size: int | None = None, **wanted: Any) -> ExportStatus:
        return self.router.create(name, CreateRequest(size=size, transport="nbd", **wanted))

    def fork(self, name: str, source: str, **wanted: Any) -> ExportStatus:
        return self.create(name, source=source, **wanted)

    def core(self, name: str) -> CoreVolume:
        volume = self.router.table.get(name).volume
        assert volume is not None
        return volume.core

    def base(self, name: str, data: bytes, size: int = 256 * MIB, at: int = 0) -> None:
        """A base with ``data`` at ``at``, by way of a volume that is removed again."""
        self.create(f"{name}-origin", size)
        self.core(f"{name}-origin").pwrite(at, data)
        self.router.drain(f"{name}-origin")
        self.router.forks.make_base(f"{name}-origin", PromoteRequest(base=name))
        self.router.remove(f"{name}-origin")


@contextlib.contextmanager
def delayed(memory: MemoryStore, seconds: float) -> Iterator[None]:
    memory.latency = seconds
    try:
        yield
    finally:
        memory.latency = 0.0


def attach(node: Node, name: str = "v", *, take_over: bool = False) -> None:
    node.router.attach(name, AttachRequest(transport="nbd", take_over=take_over))
