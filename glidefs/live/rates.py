"""From two looks at a volume's counters to what it did in between."""

from __future__ import annotations

from collections.abc import Sequence
from operator import sub

from msgspec import Struct

from glidefs.core.brief import IDLE, Brief, grown

BUCKET_UNIT = 256e-9
"""Seconds; see csrc/volume/stats.h."""
_READ, _WRITE = 0, 1
_OPS, _BYTES, _ERRORS, _SUMS, _OTHERS = 0, 4, 8, 12, 16
"""Where these begin in the numbers of a :class:`Brief`."""


class Rates(Struct, frozen=True, gc=False):
    """What a volume did, per second; latencies in seconds, None where no request ended.

    ``store_reads``: missing blocks that guests asked for. Hit ratios are parts of all block reads, None
    where there was none. ``waits``: times that writers waited for space, or for their turn.
    """

    read_iops: float = 0.0
    write_iops: float = 0.0
    read_bytes: float = 0.0
    write_bytes: float = 0.0
    other_iops: float = 0.0
    errors: float = 0.0
    read_mean: float | None = None
    write_mean: float | None = None
    read_p99: float | None = None
    write_p99: float | None = None
    log_hits: float | None = None
    cache_hits: float | None = None
    store_reads: float = 0.0
    waits: float = 0.0


NOTHING = Rates()


def lower_bound(bucket: int) -> float:
    """Seconds at which a bucket of latencies begins."""
    if bucket == 0:
        return 0.0
    power = 2.0 ** (bucket // 2)
    return BUCKET_UNIT * (power if bucket % 2 == 0 else 1.5 * power)


LAST = 63
_BOUNDS = [lower_bound(bucket) for bucket in range(65)]


def quantile(buckets: Sequence[int], part: float) -> float | None:
    """The latency below which this part of the requests was; evenly spread within a bucket. None: no request.

    Bucket LAST has no upper bound: its lower one is the answer.
    """
    total = sum(buckets)
    if total <= 0:
        return None
    rank = part * total
    below = total
    # From the top: the percentiles that are asked for are high ones.
    for bucket in range(len(buckets) - 1, -1, -1):
        count = buckets[bucket]
        if count > 0 and below - count < rank:
            low = _BOUNDS[bucket]
            if bucket == LAST:
                return low
            return low + (rank - below + count) / count * (_BOUNDS[bucket + 1] - low)
        below -= count
    return 0.0


def rates(before: Brief, after: Brief, seconds: float) -> Rates:
    """What was done between two looks, ``seconds`` apart. A volume that was opened anew began at zero."""
    if after is before or seconds <= 0:
        return NOTHING
    new: Sequence[int] = list(map(sub, after.numbers, before.numbers))
    if min(new) < 0:
        before, new = IDLE, after.numbers
    if not any(new):
        return NOTHING
    faults, log, cache, zero = new[_OTHERS : _OTHERS + 4]
    looked = faults + log + cache + zero
    return Rates(
        read_iops=new[_OPS] / seconds,
        write_iops=new[_OPS + 1] / seconds,
        read_bytes=new[_BYTES] / seconds,
        write_bytes=new[_BYTES + 1] / seconds,
        other_iops=(new[_OPS + 2] + new[_OPS + 3]) / seconds,
        errors=sum(new[_ERRORS:_SUMS]) / seconds,
        read_mean=_mean(new, _READ),
        write_mean=_mean(new, _WRITE),
        read_p99=_p99(before, after, _READ) if new[_OPS] else None,
        write_p99=_p99(before, after, _WRITE) if new[_OPS + 1] else None,
        log_hits=log / looked if looked else None,
        cache_hits=cache / looked if looked else None,
        store_reads=faults / seconds,
        waits=sum(new[_OTHERS + 6 : _OTHERS + 9]) / seconds,
    )


def _mean(new: Sequence[int], op: int) -> float | None:
    return new[_SUMS + op] / new[_OPS + op] / 1e9 if new[_OPS + op] else None


def _p99(before: Brief, after: Brief, op: int) -> float | None:
    # Counters are read while guests go on: one may be a request ahead of another.
    return quantile([max(0, count) for count in grown(before, after, op)], 0.99)
