"""The engine: worker threads, write-log budget, block cache, and the queues of faults and events."""

from __future__ import annotations

import contextlib
import enum
import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from glidefs.core._core import ffi, lib
from glidefs.core.cache import BlockCache
from glidefs.core.check import Closed, Handle, check
from glidefs.core.shadow import ShadowFile, ShadowItem, from_c
from glidefs.core.volume import CoreVolume, Recovery, VolumeConfig, open_volume

EVENTS_AT_ONCE = 64


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of an engine, in bytes and the named units of time; see ``struct glide_engine_config``."""

    cache_dir: Path
    workers: int = 0
    segment_bytes: int = 64 << 20
    log_limit: int = 10 << 30
    map_budget: int = 256 << 20
    cache_bytes: int = 20 << 30
    log_full_timeout_ms: int = 0
    read_timeout_ms: int = 0
    busy_poll_us: int = 0
    nbd_memory: int = 256 << 20
    nbd_stall_ms: int = 60_000
    standby: bool = False


class Fault(msgspec.Struct, frozen=True):
    """``count`` absent blocks from ``block`` of the volume with this cookie; hand ``stamp`` back.

    With ``chunks`` the question is not for data but which blocks of so many chunks, from that of ``block``
    on, are zeros. The first chunk must be answered. With a ``ticket`` it is what may have changed from
    ``block`` on since the snapshot with this number; see :class:`glidefs.core.volume.Changed`.
    """

    volume: int
    block: int
    stamp: int
    count: int
    chunks: int = 0
    ticket: int = 0
    snapshot: int = 0


class EventKind(enum.IntEnum):
    """What happened in the core; see ``enum glide_event_kind``."""

    SEALED = lib.GLIDE_EV_SEALED
    LOG_FULL = lib.GLIDE_EV_LOG_FULL
    MAP_FULL = lib.GLIDE_EV_MAP_FULL
    STORE_FLUSH = lib.GLIDE_EV_STORE_FLUSH
    SYNC_FAILED = lib.GLIDE_EV_SYNC_FAILED
    DISK_ERROR = lib.GLIDE_EV_DISK_ERROR
    FIRST_DIRTY = lib.GLIDE_EV_FIRST_DIRTY
    CONN_CLOSED = lib.GLIDE_EV_CONN_CLOSED
    UBLK_DOWN = lib.GLIDE_EV_UBLK_DOWN
    READ_LOST = lib.GLIDE_EV_READ_LOST
    VHOST_DOWN = lib.GLIDE_EV_VHOST_DOWN


class Event(NamedTuple):
    """An event of the volume with this cookie."""

    volume: int
    kind: int
    a: int
    b: int


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and counters of the host; bytes, slots, counts."""

    log_bytes: int
    log_spare_bytes: int
    log_limit: int
    map_bytes: int
    map_budget: int
    cache_slots: int
    cache_used: int
    cache_hits: int
    cache_misses: int
    cache_evictions: int
    nbd_replies: int
    nbd_payloads: int
    cache_lost: int
    cache_errno: int
    faults_queued: int
    workers: int


class Engine(Handle):
    """One per process. Volumes are opened on it and must be closed before it.

    ``close()`` waits for threads in :meth:`faults_next` and :meth:`events_next`, which return after
    their timeout at the latest.
    """

    __slots__ = ("cache", "config")

    def __init__(self, config: EngineConfig) -> None:
        sector = int(lib.GLIDE_SECTOR)
        if config.segment_bytes % sector:
            raise ValueError(f"segment_bytes must be a multiple of {sector}")
        config.cache_dir.mkdir(parents=True, exist_ok=True)
        cache_dir = ffi.new("char[]", os.fsencode(config.cache_dir))  # kept alive over the call
        raw = ffi.new("struct glide_engine_config *")
        raw.workers = config.workers
        raw.segment_sectors = config.segment_bytes // sector
        raw.log_limit = config.log_limit
        raw.map_budget = config.map_budget
        raw.cache_bytes = config.cache_bytes
        raw.cache_dir = cache_dir
        raw.log_full_timeout_ms = config.log_full_timeout_ms
        raw.read_timeout_ms = config.read_timeout_ms
        raw.busy_poll_us = config.busy_poll_us
        raw.nbd_memory = config.nbd_memory
        raw.nbd_stall_ms = config.nbd_stall_ms
        raw.standby = config.standby
        out = ffi.new("glide_engine **")
        check(lib.glide_engine_open(raw, out), f"open the engine in {config.cache_dir}")
        super().__init__(out[0])
        self.config = config
        self.cache = BlockCache(self)

    def _free(self, pointer: Any) -> None:
        lib.glide_engine_close(pointer)

    def shutdown(self) -> None:
        """Threads that wait for faults, events or the block cache get Closed or an error, now and later."""
        with self._use() as engine:
            lib.glide_engine_shutdown(engine)

    def end_workers(self) -> None:
        """End the worker threads; the kernel then gives the ublk devices that they served to another server.

        Volumes that are open, frozen, are let go without a word to guests. What is called on them from then
        on raises Closed; they and their devices are still to be closed.
        """
        with self._use() as engine:
            lib.glide_engine_end_workers(engine)

    def open_volume(
        self, config: VolumeConfig, shadow: ShadowFile | None = None
    ) -> tuple[CoreVolume, Recovery]:
        """Replay the log of a volume and serve it. Raises CorruptLog, CoreError.

        With ``shadow``, a debug option, every READ is compared with it.
        """
        return open_volume(self, config, shadow)

    def wake(self) -> None:
        """End the waits of now in :meth:`faults_next`, :meth:`events_next` and :meth:`shadow_next`.

        Of an engine that is closed there are none.
        """
        with contextlib.suppress(Closed), self._use() as engine:
            lib.glide_engine_wake(engine)

    def faults_next(self, max_blocks: int, timeout_ms: int) -> Fault | None:
        """The next run of at most ``max_blocks`` absent blocks, or None after the timeout.

        Any number of threads may wait. Raises Closed.
        """
        raw = ffi.new("struct glide_fault *")
        with self._use() as engine:
            if not check(lib.glide_faults_next(engine, max_blocks, timeout_ms, raw), "faults"):
                return None
        return Fault(raw.volume, raw.block, raw.stamp, raw.count, raw.chunks, raw.ticket, raw.snapshot)

    def events_next(self, timeout_ms: int) -> list[Event]:
        """Events in order, or an empty list after the timeout. Raises Closed."""
        raw = ffi.new("struct glide_event[]", EVENTS_AT_ONCE)
        with self._use() as engine:
            count = check(lib.glide_events_next(engine, timeout_ms, raw, EVENTS_AT_ONCE), "events")
        return [Event(raw[i].volume, raw[i].kind, raw[i].a, raw[i].b) for i in range(count)]

    def shadow_next(self, timeout_ms: int) -> ShadowItem | None:
        """The next question or finding of shadow verify; None after the timeout. Many threads may wait.

        Raises Closed.
        """
        raw = ffi.new("struct glide_shadow_item *")
        with self._use() as engine:
            if not check(lib.glide_shadow_next(engine, timeout_ms, raw), "shadow verify"):
                return None
        return from_c(raw)

    def pace(self, bytes_per_second: int) -> None:
        """Limit what the writers of all volumes together may append; 0: no limit."""
        with self._use() as engine:
            lib.glide_engine_pace(engine, bytes_per_second)

    def stats(self) -> EngineStats:
        """Gauges and counters now."""
        raw = ffi.new("struct glide_engine_stats *")
        with self._use() as engine:
            lib.glide_engine_stats_get(engine, raw)
        return EngineStats(**{name: int(getattr(raw, name)) for name in EngineStats.__struct_fields__})
