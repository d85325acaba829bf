"""The counters of many volumes that a rate is made of, as small as they can be kept from look to look."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from operator import sub
from typing import Any, NamedTuple

from glidefs.core._core import ffi, lib
from glidefs.core.figures import OPS, _of_many
from glidefs.core.volume import CoreVolume

_BUCKETS = int(lib.GLIDE_HIST_BUCKETS)
_SIZE = ffi.sizeof("struct glide_volume_stats")
_HISTOGRAMS = 8 * 3 * len(OPS)
"""Where they begin; those of READ and WRITE come first."""
_USED = 8 * 2 * _BUCKETS
_NUMBERS = struct.Struct(f"@12Q{8 * len(OPS) * _BUCKETS}x13Q")
_HISTOGRAM = 8 * _BUCKETS
_FIRST = [struct.Struct(f"@{count}Q") for count in range(_BUCKETS + 1)]


class Brief(NamedTuple):
    """Counters of one volume since it was opened.

    ``numbers``: ops, bytes and errors, each in the order of :data:`OPS`, the sums of latencies (ns) likewise,
    then faults, log_hits, cache_reads, zero_reads, rmw, syncs, log_full_waits, map_full_waits, paced.
    ``latency``: the histograms of READ and WRITE as they lie in memory, see :func:`grown`.
    """

    numbers: tuple[int, ...]
    latency: bytes


IDLE = Brief((0,) * 25, bytes(_USED))
"""Of a volume that nobody has used: one for all of them."""


def briefs(volumes: Sequence[CoreVolume]) -> list[Brief | None]:
    """Of many volumes of one engine, with one call for a few hundred of them; None for one that is closed."""
    return _of_many(volumes, "struct glide_volume_stats[]", lib.glide_volumes_stats_get, _read)


def _read(raw: Any) -> list[Brief]:
    data = memoryview(ffi.buffer(raw))
    found = []
    for at in range(0, len(data), _SIZE):
        numbers = _NUMBERS.unpack_from(data, at)
        if any(numbers[:4]):
            begin = at + _HISTOGRAMS
            found.append(Brief(numbers, bytes(data[begin : begin + _USED])))
        else:
            found.append(IDLE)
    return found


def grown(before: Brief, after: Brief, op: int) -> list[int]:
    """By how much each bucket of the histogram of READ (0) or WRITE (1) grew; see csrc/volume/stats.h.

    Up to the last bucket that is not empty: most are.
    """
    begin = op * _HISTOGRAM
    used = len(after.latency[begin : begin + _HISTOGRAM].rstrip(b"\0"))
    first = _FIRST[-(-used // 8)]
    return list(map(sub, first.unpack_from(after.latency, begin), first.unpack_from(before.latency, begin)))
