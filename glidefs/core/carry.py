"""Cold reads that the core carries: blocks from packs to who waits, without a call of Python for each.

Python says which blocks, which packs and where those are; see "cold reads" in csrc/glide_packs.h.
"""

from __future__ import annotations

import contextlib
import struct
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from glidefs.core._core import ffi, lib
from glidefs.core.check import Closed, check
from glidefs.core.engine import Engine, Fault
from glidefs.store.base import Source

if TYPE_CHECKING:
    from glidefs.core.volume import CoreVolume
    from glidefs.tracing.spans import Stages

NO_BLOCK = (1 << 64) - 1
"""As ``leave``: none."""
ABSENT = int(lib.GLIDE_PLAN_ABSENT)
DONE = int(lib.GLIDE_PLAN_DONE)
UNSURE = int(lib.GLIDE_PLAN_UNSURE)
ZERO = int(lib.GLIDE_PLAN_ZERO)
FAULTS_AT_ONCE = 512
CARRIED_AT_ONCE = 256

_FAULT = struct.Struct("=QQQIIQQQ")
_CARRIED = struct.Struct("=QiIQQQ")
_PLAN = struct.Struct("=Q16sIIII")
_ENTRY_SIZE = 40
_MADE = 4096
_made: dict[Source, tuple[Any, Any, Any]] = {}
_MOST_PARTS = int(lib.GLIDE_BLOCK_SECTORS)


class AbsentBlock(NamedTuple):
    """A block that somebody waits for, of the volume with this cookie; ``stamp`` as in a Fault.

    ``order``: of its posting in the engine. ``stages``: what it went through, where somebody notes that.
    """

    volume: int
    block: int
    stamp: int
    order: int
    stages: Stages | None = None


class Carried(NamedTuple):
    """A task that ended: its number, 0 or a negative errno, requests that were answered, bytes, time.

    What it answered answers faults of lower ``order``, too.
    """

    task: int
    err: int
    gets: int
    bytes: int
    ns: int
    order: int


Row = tuple[int, bytes, int, int, int, int]
"""Of :class:`BlockPlans`: block, key, first part, parts, state (ABSENT, DONE, UNSURE, ZERO), task from 0."""


class Batch(NamedTuple):
    """What happened since the last: blocks that are waited for, questions, tasks that ended.

    Questions are about zeros and about what changed.
    """

    faults: list[AbsentBlock]
    questions: list[Fault]
    carried: list[Carried]


class News:
    """Faults and tasks that ended, for one thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._faults = ffi.new("struct glide_fault[]", FAULTS_AT_ONCE)
        self._carried = ffi.new("struct glide_carried[]", CARRIED_AT_ONCE)
        self._counts = ffi.new("uint32_t[2]")

    def next(self, timeout_ms: int, linger_us: int = 0) -> Batch:
        """What there is, or nothing after the timeout. Raises Closed.

        From the first on it waits ``linger_us`` microseconds for more.
        """
        counts = self._counts
        counts[0], counts[1] = FAULTS_AT_ONCE, CARRIED_AT_ONCE
        with self._engine._use() as engine:
            check(
                lib.glide_news_next(engine, timeout_ms, linger_us, self._faults, self._carried, counts),
                "faults",
            )
        absent: list[AbsentBlock] = []
        questions: list[Fault] = []
        faults = bytes(ffi.buffer(self._faults, counts[0] * _FAULT.size))
        for volume, block, stamp, count, chunks, order, ticket, snapshot in _FAULT.iter_unpack(faults):
            if chunks or ticket:
                questions.append(Fault(volume, block, stamp, count, chunks, ticket, snapshot))
            else:
                absent.append(AbsentBlock(volume, block, stamp, order))
        carried = bytes(ffi.buffer(self._carried, counts[1] * _CARRIED.size))
        return Batch(absent, questions, [Carried._make(raw) for raw in _CARRIED.iter_unpack(carried)])

    def poke(self) -> None:
        """Let :meth:`next` return at once, now or the next time. Any thread; of a closed engine nothing."""
        with contextlib.suppress(Closed), self._engine._use() as engine:
            lib.glide_news_poke(engine)


class BlockPlans:
    """What blocks are made of. For one thread.

    ``groups`` are records of pack indices, newest first, and the blocks that those packs may have; packs and
    blocks are numbered through all groups. ``prefix`` binds the keys of the block cache to it; None leaves
    them in the scope of the host.
    """

    __slots__ = ("_count", "_kept", "_packs", "_parts", "_plans")

    def __init__(self, groups: Sequence[tuple[Sequence[bytes], Sequence[int]]], prefix: str | None) -> None:
        records = [data for mine, _ in groups for data in mine]
        blocks = array("Q")
        parts = 1
        for mine, wanted in groups:
            blocks.extend(wanted)
            parts += len(wanted) * min(len(mine), _MOST_PARTS)
        buffers = [ffi.from_buffer(data) for data in records]
        self._kept = buffers  # while C has their addresses
        self._count = len(blocks)
        self._packs = len(records)
        self._plans = ffi.new("struct glide_block_plan[]", self._count)
        self._parts = ffi.new("struct glide_part[]", parts)
        lib.glide_plan_blocks(
            ffi.new("void *[]", buffers),
            [len(data) // _ENTRY_SIZE for data in records],
            [(len(mine), len(wanted)) for mine, wanted in groups],
            len(groups),
            ffi.from_buffer("uint64_t[]", blocks),
            ffi.NULL if prefix is None else prefix.encode(),
            self._plans,
            self._parts,
        )

    def answer(self, engine: Engine, volume: int, stamp: int, leave: int = NO_BLOCK) -> tuple[int, list[int]]:
        """Answer what the cache has. Raises CoreError.

        Returns how many blocks are left, those that are ZERO included, and the packs that have parts of those
        that are ABSENT.
        """
        used = bytearray(self._packs)
        with engine._use() as pointer:
            left = check(
                lib.glide_plan_answer(
                    pointer,
                    volume,
                    stamp,
                    leave,
                    self._plans,
                    self._count,
                    self._parts,
                    ffi.from_buffer("uint8_t[]", used),
                ),
                "answer",
            )
        return left, [i for i, is_used in enumerate(used) if is_used]

    def demote(self, volume: CoreVolume, segment: int, committed: int) -> int:
        """Put in the cache what ``segment``, the oldest, has some of and is wholly here; how many blocks.

        ``committed``: the last segment that the manifest of the plans includes.
        Raises CoreError, with errno EAGAIN while every slot of the cache is pinned, and Closed.
        """
        with volume._use() as pointer:
            return check(
                lib.glide_volume_demote(pointer, segment, committed, self._plans, self._count, self._parts),
                "demote",
            )

    def rows(self) -> list[Row]:
        """All blocks, in the order in which they were given."""
        return list(_PLAN.iter_unpack(bytes(ffi.buffer(self._plans))))

    def skip(self, row: int) -> None:
        """Do not carry this one."""
        self._plans[row].state = UNSURE

    def parts(self, row: int) -> list[tuple[int, int, int, int, int, bytes]]:
        """(pack, mask, zero mask, offset, stored, hash) of each part of a block, newest first."""
        plan = self._plans[row]
        found = [self._parts[i] for i in range(plan.first, plan.first + plan.count)]
        return [(p.pack, p.mask, p.zero_mask, p.offset, p.stored, bytes(p.hash)) for p in found]

    def carry(
        self,
        engine: Engine,
        volume: int,
        stamp: int,
        first_task: int,
        sources: dict[int, Source],
        *,
        gap: int,
        limit: int,
        leave: int = NO_BLOCK,
    ) -> int:
        """Fetch what is ABSENT, with sources by the number of the pack, and answer it.

        Returns the number of tasks. Their numbers begin with ``first_task``. ``gap`` and ``limit`` in bytes.
        Raises CoreError: nothing was begun.
        """
        raw = ffi.new("struct glide_source[]", self._packs)
        kept = {pack: _to_c(source) for pack, source in sources.items()}  # while C has the addresses
        for pack, made in kept.items():
            raw[pack] = made[0]
        what = ffi.new("struct glide_carry *")
        what.volume = volume
        what.stamp = stamp
        what.leave = leave
        what.first_task = first_task
        what.gap = gap
        what.limit = limit
        what.plans = self._plans
        what.parts = self._parts
        what.sources = raw
        what.plan_count = self._count
        with engine._use() as pointer:
            tasks = check(lib.glide_carry(pointer, what), "carry")
        del kept
        return tasks


def _to_c(source: Source) -> Any:
    """A ``struct glide_source``. What it points to is kept beside it, and both for the next time."""
    found = _made.get(source)
    if found is None:
        parts = source.target, source.host, source.address, source.server, source.ca
        buffers = tuple(ffi.from_buffer(part) for part in parts)
        raw = ffi.new("struct glide_source *")
        raw.kind = lib.GLIDE_SOURCE_HTTP if source.address else lib.GLIDE_SOURCE_FILE
        raw.timeout_ms = int(source.timeout * 1000)
        raw.connect_ms = int(source.connect_timeout * 1000)
        raw.target, raw.host, raw.address = buffers[:3]
        if source.server:
            raw.server, raw.ca = buffers[3:]
        raw.address_length = len(source.address)
        if len(_made) >= _MADE:
            _made.clear()
        found = _made[source] = (raw[0], raw, buffers)
    return found
