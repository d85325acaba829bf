"""Where the time of a slow read went: stages of the faults that guests wait for, and spans of the slow ones.

A fault is in one stage at a time: ``queue`` until a thread takes it; ``plan`` while that finds out what the
blocks are made of and where that is, and loads what says so; ``GET`` while their bytes are on their way,
``shared GET`` if that is because of another read; ``verify`` from the last byte until who waits is answered:
hash, cache, answer. What is tried again goes through stages once more, after a ``pause`` if the store failed.

Used only where spans go somewhere: else faults have no stages.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from glidefs.core.carry import AbsentBlock, Carried
from glidefs.core.engine import Fault
from glidefs.formats.pack import CHUNK_BLOCKS
from glidefs.reading.ahead import runs_of
from glidefs.reading.carry import Task
from glidefs.tracing.spans import Sink, Stages, Value

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

READS_A_SECOND = 20
"""That are told of: an outage has thousands, which say the same. The next one says how many were left out."""
Of = Callable[[range], Stages]
"""The stages of some blocks until now, as a copy."""
_HERE = (errno.EUCLEAN, errno.EAGAIN, errno.ENOMEM)
"""Errors of carried tasks whose bytes had come."""


class SlowReads:
    """Makes spans of reads that took ``slow`` seconds or longer.

    ``find`` gives the volume of a cookie. Thread-safe; ``_lock`` guards the counts.
    """

    def __init__(self, sink: Sink, slow: float, find: Callable[[int], Volume | None]) -> None:
        self._sink = sink
        self._slow = int(slow * 1e9)
        self._find = find
        self._lock = threading.Lock()
        self._second = 0
        self._told = 0
        self._left_out = 0

    def carried(self, landed: Iterable[tuple[Task, Carried]]) -> None:
        """Tasks of the core ended. Those that failed go on elsewhere."""
        for task, one in landed:
            turn = task.request.turn
            if turn is not None and not one.err and self._is_slow(turn.began):
                stages = turn.landed(one, task.blocks)
                self._ended(task.request.volume.name, min(task.blocks), len(task.blocks), stages)

    def at_once(self, export: str, turn: Turn, rest: list[int]) -> None:
        """The carrier has answered what of a turn is neither ``rest`` nor under way. It may have waited."""
        if self._is_slow(turn.began):
            for first, count in runs_of(turn.answered(rest), CHUNK_BLOCKS):
                self._ended(export, first, count, turn.of(range(first, first + count)))

    def waited(self, fault: AbsentBlock) -> None:
        """What another read or read-ahead fetched has answered this one, too."""
        volume = self._find(fault.volume)
        if volume is not None and fault.stages is not None:
            self._ended(volume.name, fault.block, 1, _shared(fault.stages))

    def served(self, export: str, fault: Fault, stages: Stages) -> None:
        """A thread that may wait is done with a fault."""
        if fault.chunks:
            self._ended(export, fault.block, fault.chunks * CHUNK_BLOCKS, stages, "zeros")
        else:
            self._ended(export, fault.block, fault.count, stages)

    def _is_slow(self, began: int) -> bool:
        return time.monotonic_ns() - began >= self._slow

    def _ended(self, export: str, first: int, count: int, stages: Stages, name: str = "read") -> None:
        if not self._is_slow(stages.begin):
            return
        with self._lock:
            second = time.monotonic_ns() // 10**9
            if second != self._second:
                self._second, self._told = second, 0
            if self._told >= READS_A_SECOND:
                self._left_out += 1
                return
            self._told += 1
            left_out, self._left_out = self._left_out, 0
        attributes: dict[str, Value] = {
            "glidefs.export": export,
            "glidefs.block": first,
            "glidefs.blocks": count,
            "glidefs.gets": stages.gets,
            "glidefs.bytes": stages.bytes,
        }
        if left_out:
            attributes["glidefs.left_out"] = left_out
        self._sink.put(stages.span(name, attributes))


class Turn:
    """Blocks that are handed to the carrier together, and their stages. For the thread that takes faults.

    ``began``: when the first of them was waited for.
    """

    def __init__(self, waiting: dict[int, AbsentBlock]) -> None:
        """``waiting``: the fault of each block. They are planned now, and go on with stages of this turn."""
        self._stages: dict[int, Stages] = {}
        self.began = now = time.monotonic_ns()
        before, stages = None, Stages("queue")
        for block, fault in waiting.items():
            if fault.stages is not None and fault.stages is not before:  # those that came together share them
                before, stages = fault.stages, fault.stages.fork()
                stages.enter("plan", now)
                self.began = min(self.began, stages.begin)
            self._stages[block] = stages
            waiting[block] = noting(fault, stages)
        self._handed_over = 0
        self._under_way: set[int] = set()

    def hand_over(self) -> None:
        """The core is about to be told."""
        self._handed_over = time.monotonic_ns()

    def under_way(self, blocks: Iterable[int]) -> None:
        """These are being fetched, because of this turn or for another read."""
        self._under_way.update(blocks)

    def answered(self, rest: Iterable[int]) -> list[int]:
        """Blocks that are neither under way nor among ``rest``."""
        return sorted(self._stages.keys() - self._under_way - set(rest))

    def of(self, blocks: Iterable[int]) -> Stages:
        """The stages of some blocks until now, as a copy: those of the one that waits longest."""
        return min(self._stages[block] for block in blocks).fork()

    def landed(self, one: Carried, blocks: Iterable[int]) -> Stages:
        """The same of blocks whose task ended."""
        stages = self.of(blocks)
        stages.gets += one.gets
        stages.bytes += one.bytes
        stages.enter("GET", self._handed_over)
        if not one.err or -one.err in _HERE:
            stages.enter("verify", self._handed_over + one.ns)
        if one.err:
            stages.fail(errno.errorcode.get(-one.err, str(one.err)))
        return stages


def noting(fault: AbsentBlock, stages: Stages) -> AbsentBlock:
    """The same fault with these stages; ``_replace`` takes three times as long."""
    return AbsentBlock(fault.volume, fault.block, fault.stamp, fault.order, stages)


def _shared(stages: Stages) -> Stages:
    """Of a fault that waited, since it was planned, for what another read fetched."""
    after = stages.fork()
    after.was("shared GET")
    return after


def again(waiters: Iterable[AbsentBlock]) -> list[AbsentBlock]:
    """Faults that waited for what another read fetched, which ended: they queue once more."""
    found: list[AbsentBlock] = []
    for waiter in waiters:
        if waiter.stages is not None:
            stages = _shared(waiter.stages)
            stages.enter("queue")
            waiter = noting(waiter, stages)
        found.append(waiter)
    return found
