"""State and counters of volumes, of many at once too: a call for each one is a round trip to its worker."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from glidefs.core._core import ffi, lib
from glidefs.core.check import Closed

if TYPE_CHECKING:
    from glidefs.core.engine import Engine
    from glidefs.core.volume import CoreVolume

T = TypeVar("T")

OPS = ("read", "write", "flush", "zero")
"""The order of the counters by operation in :class:`VolumeStats`."""
AT_ONCE = 256
"""Volumes of one call: for so many a worker answers no guest (some 50 us), and their stats are 600 KB."""


class VolumeInfo(msgspec.Struct, frozen=True, gc=False):
    """State of a volume's log; see ``struct glide_volume_info``, whose fields have the same order."""

    size: int
    first_seq: int
    last_seq: int
    sealed_seq: int
    committed_seq: int
    active_bytes: int
    dirty_bytes: int
    oldest_dirty_ns: int
    oldest_ns: int
    dead_seq: int
    log_bytes: int
    map_bytes: int
    parked: int
    longest_wait_ns: int
    connections: int
    failed: int

    @property
    def dirty_age(self) -> float:
        """Seconds since the oldest write that is not in the store; 0 when clean."""
        return max(0.0, time.time() - self.oldest_dirty_ns / 1e9) if self.oldest_dirty_ns else 0.0


class VolumeStats(msgspec.Struct, frozen=True, gc=False):
    """Counters since open, in the order of ``struct glide_volume_stats``.

    Tuples are in the order of :data:`OPS`, ``latency`` as in csrc/volume/stats.h.
    """

    ops: tuple[int, ...]
    bytes: tuple[int, ...]
    errors: tuple[int, ...]
    latency: tuple[tuple[int, ...], ...]
    latency_sum_ns: tuple[int, ...]
    faults: int
    log_hits: int
    cache_reads: int
    zero_reads: int
    rmw: int
    syncs: int
    log_full_waits: int
    map_full_waits: int
    paced: int
    shadow_compared: int
    shadow_differences: int
    shadow_changed: int
    shadow_absent: int


_BUCKETS = int(lib.GLIDE_HIST_BUCKETS)
_IDLE = ((0,) * _BUCKETS,) * len(OPS)
_INFO = struct.Struct(f"@{len(VolumeInfo.__struct_fields__) - 2}Q2I")
_STATS = struct.Struct("@12Q")
"""Counters by operation: ops, bytes, errors."""
_TOTALS = struct.Struct(f"@{len(OPS) + len(VolumeStats.__struct_fields__) - 5}Q")
"""What is behind the histograms: the sums by operation, and the other counters."""
_HISTOGRAM = struct.Struct(f"@{_BUCKETS}Q")


def _fields(name: str) -> tuple[str, ...]:
    return tuple(field for field, _ in ffi.typeof(f"struct {name}").fields)


assert (ffi.sizeof("struct glide_volume_info"), _fields("glide_volume_info")) == (
    _INFO.size,
    VolumeInfo.__struct_fields__,
)
assert (ffi.sizeof("struct glide_volume_stats"), _fields("glide_volume_stats")) == (
    _STATS.size + len(OPS) * _HISTOGRAM.size + _TOTALS.size,
    VolumeStats.__struct_fields__,
)


def infos_from(raw: Any) -> list[VolumeInfo]:
    """Of a C array of infos."""
    return [VolumeInfo(*values) for values in _INFO.iter_unpack(ffi.buffer(raw))]


def stats_from(raw: Any) -> list[VolumeStats]:
    """Of a C array of stats."""
    data = memoryview(ffi.buffer(raw))
    size = ffi.sizeof("struct glide_volume_stats")
    return [_stats(data, at) for at in range(0, len(data), size)]


def _stats(data: memoryview, at: int) -> VolumeStats:
    counts = _STATS.unpack_from(data, at)
    at += _STATS.size
    # A histogram that was not begun is not worth 64 numbers: most exports are idle.
    latency = _IDLE
    if any(counts[:4]):
        starts = range(at, at + len(OPS) * _HISTOGRAM.size, _HISTOGRAM.size)
        latency = tuple(_HISTOGRAM.unpack_from(data, start) for start in starts)
    totals = _TOTALS.unpack_from(data, at + len(OPS) * _HISTOGRAM.size)
    return VolumeStats(counts[:4], counts[4:8], counts[8:12], latency, totals[:4], *totals[4:])


def infos(volumes: Sequence[CoreVolume]) -> list[VolumeInfo | None]:
    """State of the logs of many volumes of one engine; None for one that is closed."""
    found = _of_many(volumes, "struct glide_volume_info[]", lib.glide_volumes_info_get, infos_from)
    return [info if info is not None and info.size else None for info in found]


def stats(volumes: Sequence[CoreVolume]) -> list[VolumeStats | None]:
    """Counters of many volumes; None for one that is closed."""
    return _of_many(volumes, "struct glide_volume_stats[]", lib.glide_volumes_stats_get, stats_from)


def totals(engine: Engine) -> VolumeStats:
    """The sums of all volumes since the engine began, those that were closed too. Raises Closed."""
    raw = ffi.new("struct glide_volume_stats[1]")
    with engine._use() as pointer:
        lib.glide_engine_totals(pointer, raw)
    return stats_from(raw)[0]


def _of_many(
    volumes: Sequence[CoreVolume],
    kind: str,
    get: Callable[[Any, int, Any], object],
    read: Callable[[Any], list[T]],
) -> list[T | None]:
    found: list[T | None] = [None] * len(volumes)
    for start in range(0, len(volumes), AT_ONCE):
        with _held(volumes[start : start + AT_ONCE]) as held:
            raw = ffi.new(kind, len(held))
            get(ffi.new("glide_volume *[]", list(held.values())), len(held), raw)
        for at, value in zip(held, read(raw), strict=True):
            found[start + at] = value
    return found


@contextlib.contextmanager
def _held(volumes: Sequence[CoreVolume]) -> Iterator[dict[int, Any]]:
    """Keep volumes open for the length of a C call: their places in the list, and the pointers."""
    held: dict[int, Any] = {}
    try:
        for at, volume in enumerate(volumes):
            with contextlib.suppress(Closed):
                held[at] = volume._acquire()
        yield held
    finally:
        for at in held:
            volumes[at]._release()
