"""A clock for gc's grace period, which also runs while the host is suspended."""

from __future__ import annotations

import time

_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def elapsed() -> float:
    """Seconds since the host booted, those of a suspend too: the collector does not sleep meanwhile."""
    return time.clock_gettime(_BOOTTIME)
