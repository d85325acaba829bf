"""Time and chance of a simulation: both come from the seed, and time passes only when somebody waits.

Everything runs on one thread. So whoever waits in the product, for a retry, a probe of the breaker or the end
of a drain, waits for a time that passes at once; a condition that only another thread could make true
is made true by what `while_waiting` runs meanwhile.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from gc_rig import START, InlinePool

import glidefs.bases.manifest_cache
import glidefs.bases.stored
import glidefs.clock
import glidefs.compaction.compactor
import glidefs.exports.copies.lineage
import glidefs.exports.copies.pins
import glidefs.exports.leaving
import glidefs.exports.opener
import glidefs.exports.router
import glidefs.exports.stored
import glidefs.gc.run
import glidefs.host.host
import glidefs.host.watch
import glidefs.manifest.commit
import glidefs.manifest.lease
import glidefs.reading.carry
import glidefs.reading.prefetch
import glidefs.reading.reader
import glidefs.reading.service
import glidefs.store.breaker
import glidefs.store.call
import glidefs.store.resilient
import glidefs.store.state
import glidefs.store.which
import glidefs.volume.volume
import glidefs.writing.pace
import glidefs.writing.retire
import glidefs.writing.scheduler
import glidefs.writing.upload

TIMED: tuple[Any, ...] = (
    glidefs.bases.stored,
    glidefs.exports.copies.pins,
    glidefs.exports.leaving,
    glidefs.bases.manifest_cache,
    glidefs.store.breaker,
    glidefs.store.call,
    glidefs.store.resilient,
    glidefs.store.state,
    glidefs.store.which,
    glidefs.manifest.commit,
    glidefs.compaction.compactor,
    glidefs.manifest.lease,
    glidefs.writing.pace,
    glidefs.writing.retire,
    glidefs.host.host,
    glidefs.reading.carry,
    glidefs.reading.reader,
    glidefs.writing.scheduler,
    glidefs.reading.service,
    glidefs.writing.upload,
    glidefs.volume.volume,
    glidefs.host.watch,
)
"""Modules that look at a clock or sleep. What the core takes for the age of a write is real time, and counts
for nothing: no write of a simulation is old enough to be uploaded for its age alone."""

WAITING: tuple[Any, ...] = (
    glidefs.store.breaker,
    glidefs.compaction.compactor,
    glidefs.writing.scheduler,
    glidefs.reading.service,
    glidefs.host.watch,
)
"""Modules that wait for conditions and events."""

POOLED: tuple[Any, ...] = (
    glidefs.bases.manifest_cache,
    glidefs.gc.run,
    glidefs.bases.stored,
    glidefs.exports.copies.lineage,
    glidefs.exports.opener,
    glidefs.exports.router,
    glidefs.exports.stored,
    glidefs.host.host,
    glidefs.reading.prefetch,
    glidefs.reading.service,
)
"""Modules that have thread pools: their work is done at once."""


class Clock:
    """Stands in for the module ``time``. Unix seconds.

    For the thread that made it: a thread that another test of this process left behind has the real time, and
    moves nobody else's.
    """

    def __init__(self) -> None:
        self.now = START
        self._thread = threading.get_ident()

    def is_mine(self) -> bool:
        """Whether the caller is the thread of the simulation."""
        return threading.get_ident() == self._thread

    def time(self) -> float:
        return self.now if self.is_mine() else time.time()

    def monotonic(self) -> float:
        return self.now if self.is_mine() else time.monotonic()

    def sleep(self, seconds: float) -> None:
        if self.is_mine():
            self.now += max(seconds, 0.0)
        else:
            time.sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class Threading:
    """Stands in for the module ``threading``: waits end at once, when their time has passed.

    ``while_waiting`` runs before each wait for a condition and may make it true.
    """

    def __init__(self, clock: Clock, while_waiting: Callable[[], object] = lambda: None) -> None:
        class Condition(threading.Condition):
            def wait(self, timeout: float | None = None) -> bool:
                if not clock.is_mine():
                    return super().wait(timeout)
                while_waiting()
                assert timeout is not None, "this wait would never end"
                clock.sleep(timeout)
                return False

        class Event(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                if not clock.is_mine():
                    return super().wait(timeout)
                if not self.is_set():
                    assert timeout is not None, "this wait would never end"
                    clock.sleep(timeout)
                return self.is_set()

        self.Condition = Condition
        self.Event = Event

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)


@contextlib.contextmanager
def patched(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes (owner, name, value) inside of the context."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextlib.contextmanager
def simulated(clock: Clock, seed: int, while_drained: Callable[[], object]) -> Iterator[Threading]:
    """The product's time, chance and threads are the simulation's inside of the context.

    ``while_drained`` runs whenever a drain waits: it does what the uploader's threads would do.
    """
    ids = random.Random(f"ids {seed}")
    jitter = random.Random(f"jitter {seed}")
    waits = Threading(clock)

    def of_seed(drawn: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: drawn(*args) if clock.is_mine() else real(*args)

    changes: list[tuple[Any, str, Any]] = [
        (glidefs.clock, "elapsed", clock.monotonic),
        (glidefs.volume.volume, "threading", Threading(clock, while_drained)),
        (secrets, "token_bytes", of_seed(ids.randbytes, secrets.token_bytes)),
        (secrets, "token_hex", of_seed(lambda count: ids.randbytes(count).hex(), secrets.token_hex)),
        (random, "uniform", of_seed(jitter.uniform, random.uniform)),
    ]
    changes += [(module, "time", clock) for module in TIMED]
    changes += [(glidefs.manifest.lease, "DOOMED_FOR", 120.0)]  # of a grace of 1,000
    changes += [(module, "threading", waits) for module in WAITING]
    changes += [(module, "ThreadPoolExecutor", InlinePool) for module in POOLED]
    with patched(changes):
        yield waits
