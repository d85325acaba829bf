"""The last hour of one export, a sample every ten seconds, in 5.8 KB.

A sample is FIELDS numbers of 16 bits. Each is a logarithm, so that one field holds a request in a minute and
a million in a second: ``code = round(log2(1 + value / unit) * 1024)``, which is exact to 0.07 %.
"""

from __future__ import annotations

import math
from array import array

STEP = 10
"""Seconds from sample to sample."""
LENGTH = 360
FIELDS: tuple[tuple[str, float], ...] = (
    ("read_iops", 1e-2),
    ("write_iops", 1e-2),
    ("read_bytes_per_second", 1.0),
    ("write_bytes_per_second", 1.0),
    ("read_p99_seconds", 1e-7),
    ("write_p99_seconds", 1e-7),
    ("dirty_bytes", 1.0),
    ("store_reads_per_second", 1e-2),
)
"""Name of a field, and the unit of its logarithm."""
WIDTH = len(FIELDS)
_SCALE = 1024
_UNKNOWN = 0xFFFF
_ZERO = array("H", bytes(2 * WIDTH))
_MISSED = array("H", [_UNKNOWN] * WIDTH)

Sample = tuple[float, ...]
"""A value for each of FIELDS."""


def code(value: float, unit: float) -> int:
    """The 16 bits of a value that is not negative."""
    return min(_UNKNOWN - 1, round(math.log2(1.0 + value / unit) * _SCALE)) if value > 0 else 0


def value_of(code: int, unit: float) -> float | None:
    """The value of a code, to four digits; None: nobody looked then."""
    if code == _UNKNOWN:
        return None
    return float(f"{unit * (2.0 ** (code / _SCALE) - 1.0):.4g}")


class Ring:
    """Samples by number, one more every STEP seconds. Its owner has a lock."""

    __slots__ = ("_codes", "busy_at")

    def __init__(self, number: int) -> None:
        self._codes = array("H", bytes(2 * WIDTH * LENGTH))
        self.busy_at = number
        """The last sample that was not all zeros."""

    def put(self, number: int, sample: Sample | None) -> None:
        """Sample ``number``; None: nothing happened."""
        if sample is None:
            self._set(number, _ZERO)
            return
        fields = zip(sample, FIELDS, strict=True)
        self._set(number, array("H", [code(value, unit) for value, (_, unit) in fields]))
        self.busy_at = number

    def miss(self, number: int) -> None:
        """Nobody looked."""
        self._set(number, _MISSED)

    def _set(self, number: int, codes: array[int]) -> None:
        at = number % LENGTH * WIDTH
        self._codes[at : at + WIDTH] = codes

    def series(self, first: int, last: int) -> dict[str, list[float | None]]:
        """Each field from sample ``first`` to ``last``, which are at most LENGTH."""
        codes = self._codes[:]
        places = [number % LENGTH * WIDTH for number in range(first, last + 1)]
        return {
            name: [value_of(codes[place + field], unit) for place in places]
            for field, (name, unit) in enumerate(FIELDS)
        }


def zeros(first: int, last: int) -> dict[str, list[float | None]]:
    """The series of an export that did nothing."""
    return {name: [0.0] * (last + 1 - first) for name, _ in FIELDS}
