"""Hosts on the real core over one store in memory, with small segments and packs."""

from __future__ import annotations

import faulthandler
import itertools
import logging
import os
from pathlib import Path
from typing import Any

import msgspec
from stored_roots import owner_of

from glidefs.core.engine import Engine, EngineConfig
from glidefs.core.gather import log_segments
from glidefs.formats.export_record import ExportRecord
from glidefs.formats.manifest import Root, encode_root, manifest_hash
from glidefs.host.host import Host
from glidefs.manifest import lease, local
from glidefs.names import manifest_key
from glidefs.store.memory import MemoryStore
from glidefs.store.resilient import ResilientStore
from glidefs.tracing.spans import Sink
from glidefs.volume.settings import HostSettings
from glidefs.volume.volume import Volume

SHADOW = bool(os.environ.get("GLIDEFS_TEST_SHADOW"))
"""Run whatever uses the rig with shadow verify on; a difference fails it."""
PREFIX = "default"
MIB = 1 << 20
BLOCK = 131072

faulthandler.enable()


def record_of(root: Root, *, read_only: bool = False, published: bool = True) -> ExportRecord:
    return ExportRecord(
        name=root.name,
        volume_id=root.volume_id,
        log_id=root.log_id,
        prefix=PREFIX,
        manifest_hash=manifest_hash(encode_root(root, manifest_key(PREFIX, root.name))),
        size=root.size,
        flush=root.flush,
        read_only=read_only,
        root_published=published,
    )


class Differences(logging.Handler):
    """What shadow verify found."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("glidefs.host.shadow").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "SHADOW DIFFERENCE" in record.getMessage():
            self.lines.append(record.getMessage())

    def close(self) -> None:
        logging.getLogger("glidefs.host.shadow").removeHandler(self)
        super().close()


class Rig:
    """Hosts over one store. A second host is another machine: its own cache, log and state."""

    def __init__(self, tmp: Path, memory: MemoryStore) -> None:
        self.tmp = tmp
        self.memory = memory
        self.live: list[tuple[Host, Engine]] = []
        self.names = itertools.count()
        self.owners: dict[int, lease.Owner] = {}
        self.differences = Differences()

    def host(
        self,
        directory: str = "a",
        *,
        engine: dict[str, Any] | None = None,
        sink: Sink | None = None,
        **settings: Any,
    ) -> Host:
        home = self.tmp / directory
        store = ResilientStore(self.memory, probe_every=0.05)
        config: dict[str, Any] = {
            "cache_dir": home / "blocks",
            "workers": 2,
            "segment_bytes": 4 * MIB,
            "log_limit": 512 * MIB,
            "map_budget": 64 * MIB,
            "cache_bytes": 64 * MIB,
        }
        config.update(engine or {})
        defaults: dict[str, Any] = {
            "log_dir": home / "logs",
            "reader_threads": 4,
            "fetch_threads": 4,
            "prefetch_threads": 2,
            "poll_ms": 20,
            "store_patience": 0.3,
            "sync_interval": 3600.0,
            "max_dirty_age": 3600.0,
            "poll_interval": 3600.0,
            "backoff": 0.1,
            "pack_bytes": 2 * MIB,
            "compaction": False,
            "compact_rate": 1 << 40,
            "shadow_dir": home / "shadow" if SHADOW else None,
        }
        defaults.update(settings)
        live_engine = Engine(EngineConfig(**config))
        made = HostSettings(**defaults)
        host = Host(live_engine, store, state_dir=home / "state", settings=made, sink=sink)
        host.start()
        self.live.append((host, live_engine))
        self.owners[id(host)] = owner_of(directory)
        return host

    def stop(self, host: Host) -> None:
        for i, (live, engine) in enumerate(self.live):
            if live is host:
                del self.live[i]
                host.close()
                engine.close()

    def create(self, host: Host, size: int = 256 * MIB, *, name: str = "", flush: str = "local") -> Volume:
        root = lease.empty_root(name or f"vol{next(self.names)}", size, self.owners[id(host)], flush=flush)
        etag = lease.create(host.store, PREFIX, root)
        return host.open(record_of(root), root, etag)

    def reopen(self, host: Host, root: Root) -> Volume:
        """As after a restart of the daemon on the same host: from the local copy of the root."""
        saved = local.load(host.state_dir, root.volume_id, manifest_key(PREFIX, root.name))
        assert saved is not None
        return host.open(msgspec.structs.replace(record_of(saved[0]), size=saved[0].size), saved[0], saved[1])

    def attach(self, host: Host, name: str, *, take_over: bool = False) -> Volume:
        """As another host does, from the store alone."""
        root, etag = lease.attach(host.store, PREFIX, name, self.owners[id(host)], take_over=take_over)
        return host.open(record_of(root), root, etag)

    def packs(self) -> list[str]:
        return [info.key for info in self.memory.list(f"{PREFIX}/packs/")]

    def pack_bytes(self) -> int:
        return sum(info.size for info in self.memory.list(f"{PREFIX}/packs/"))


def demote_all(host: Host, volume: Volume) -> int:
    """All committed segments go, the oldest first, and leave what they can."""
    done = 0
    for segment in log_segments(volume.log_dir):
        if segment <= min(volume.retirable(), volume.core.info().committed_seq):
            done += host.demoter.demote(volume, segment)
            volume.core.retire(segment)
    return done
