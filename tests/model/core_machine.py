"""The state machine over the real C core: one volume, a store that is a dict, crashes and power cuts.

One engine serves all examples (two workers, segments of 12 sectors, 8 cache slots); every example has a
fresh directory in memory. An uploader in a few lines commits what the core gathers.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import random
import shutil
import threading
import time
from typing import Any, NamedTuple

import pytest
from core_rig import Vol, apply_gather, inject, inject_nothing, trace
from core_world import AREAS, BLOCK, LOG_LIMIT, SECTORS, SEGMENT_SECTORS, SIZE, areas, shared_rig, show
from history import SECTOR, UNIT, UNITS, ZERO, History, Span, tag_bytes
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from power_cut import KEEPS, SYNC, Record, cut_power, read_trace

from glidefs.core.check import CoreError

_numbers = itertools.count(1)


class Commit(NamedTuple):
    """The store at a moment; ``at`` is the position in the trace when it took effect."""

    at: int
    segment: int
    base: dict[int, bytes]


class Op(NamedTuple):
    kind: str
    offset: int
    length: int
    tag: int


class CoreMachine(RuleBasedStateMachine):
    """Rules drive the core; every read is checked, and everything at the end of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = shared_rig()
        self.dir = self.rig.tmp / f"log{next(_numbers)}" / "id"
        self.trace_path = self.rig.tmp / "trace"
        self.tags = itertools.count(1)
        self.files: dict[str, bytes] = {}
        self.flushes: list[tuple[int, int]] = []
        self.floors: dict[int, list[tuple[int, int]]] = {}
        self.sync_failed = False
        self.other_boot = False
        self.recovered = 0
        trace(self.trace_path)

    @initialize(blocks=st.sets(st.sampled_from([0, 1, 2, 1023, 1024, 2048, 3071]), max_size=5))
    def create(self, blocks: set[int]) -> None:
        base = {block: tag_bytes((1 << 24) + block, BLOCK) for block in blocks}
        self.size = SIZE
        self.vol = Vol(self.rig, self.dir, SIZE)
        self.vol.base = base
        self.vol.open()
        self.history = History(AREAS, base)
        self.commits = [Commit(-1, 0, base)]
        self.sizes = [(-1, SIZE)]

    def teardown(self) -> None:
        try:
            if hasattr(self, "history"):
                self.check_all()
        finally:
            inject_nothing()
            trace(None)
            if hasattr(self, "vol"):
                self.vol.close()
            shutil.rmtree(self.dir.parent, ignore_errors=True)

    # -- helpers ---------------------------------------------------------------------------------

    def position(self) -> int:
        return self.trace_path.stat().st_size

    def segment_now(self) -> int:
        return max(self.vol.core.info().sealed_seq, self.vol.committed_seq) + 1

    def make_room(self, length: int) -> None:
        stats = self.rig.engine.stats()
        if (
            stats.log_bytes + 3 * length + 4 * SEGMENT_SECTORS * SECTOR > LOG_LIMIT * 3 // 4
            or stats.map_bytes > stats.map_budget // 2
        ):
            self.commit_now(retire=True)

    def timed(self, action: Any) -> Span:
        start, low = self.position(), self.segment_now()
        action()
        return Span(start, self.position(), low, max(low, self.vol.core.info().last_seq))

    def clip(self, offset: int, length: int) -> int:
        """How much of a range is within the volume."""
        return max(0, min(length, self.size - offset))

    def upload(self, segment: int | None) -> tuple[int, dict[int, bytes]]:
        """Put sealed segments into the store: all there are, or up to ``segment``."""
        begin, vol = self.position(), self.vol
        sealed = max(vol.core.seal(), vol.committed_seq) if segment is None else segment
        try:
            vol.core.sync()
        except CoreError:
            assert self.sync_failed
        with vol.gather(sealed) as gather:
            vol.base = apply_gather(vol.base, gather)
        vol.committed_seq = sealed
        self.commits.append(Commit(self.position(), sealed, vol.base))
        if segment is None:
            self.flushes.append((begin, self.position()))
            self.sync_failed = False
        vol.core.committed(sealed)
        return sealed, vol.base

    def commit_now(self, *, retire: bool, segment: int | None = None) -> None:
        sealed, base = self.upload(segment)
        self.check_store(sealed, base)
        if retire:
            self.vol.core.retire(sealed)

    def check_store(self, segment: int, base: dict[int, bytes]) -> None:
        """The image in the store is the volume at the end of a segment: never a mix, never newer."""
        if segment < self.recovered:
            return  # of what a power cut left, only the end is known
        for sector in self.history.versions:
            block = base.get(sector // SECTORS)
            at = sector % SECTORS * SECTOR
            content = ZERO if block is None else block[at : at + SECTOR]
            versions = self.history.in_commit(sector, segment)
            assert any(version.matches(content) for version in versions), (
                f"sector {sector} of the store at segment {segment}: {show(content)}, "
                f"not one of {[show(version.content) for version in versions]}"
            )

    def check_all(self) -> None:
        for first, count in AREAS:
            length = self.clip(first * SECTOR, count * SECTOR)
            if length:
                self.check_read(first * SECTOR, length)

    def check_read(self, offset: int, length: int) -> None:
        got, want = self.vol.core.pread(offset, length), self.history.expected(offset, length)
        if got != want:
            at = next(i for i in range(0, length, UNIT) if got[i : i + UNIT] != want[i : i + UNIT])
            raise AssertionError(
                f"sector {(offset + at) // SECTOR} + {(offset + at) % SECTOR}: "
                f"{got[at : at + 16].hex()}, not {want[at : at + 16].hex()}"
            )

    # -- requests --------------------------------------------------------------------------------

    def write_now(self, offset: int, length: int, fua: bool) -> None:
        length = self.clip(offset, length)
        if not length:
            return
        self.make_room(length)
        data = tag_bytes(next(self.tags), length)
        fua = fua and not self.sync_failed
        span = self.timed(lambda: self.vol.core.pwrite(offset, data, fua=fua))
        self.history.write(span, offset, data)
        if fua:
            self.flushes.append((span.start, span.end))
            first, last = offset // SECTOR, (offset + length - 1) // SECTOR
            for sector in range(first, last + 1):
                self.durable_now(sector, span.end)

    def durable_now(self, sector: int, end: int) -> None:
        """The newest version of a sector was made durable by an operation that ended at ``end``."""
        self.floors.setdefault(sector, []).append((end, len(self.history.versions[sector]) - 1))

    @rule(where=areas(SECTOR, 40 * SECTOR), fua=st.booleans())
    def write(self, where: tuple[int, int], fua: bool) -> None:
        self.write_now(*where, fua)

    @rule(where=areas(SECTOR, 4 * SECTOR))
    def write_small(self, where: tuple[int, int]) -> None:
        self.write_now(*where, False)

    @rule(where=areas(UNIT, 9 * SECTOR), fua=st.booleans())
    def write_unaligned(self, where: tuple[int, int], fua: bool) -> None:
        self.write_now(*where, fua)

    @rule(where=areas(UNIT, UNIT))
    def write_512(self, where: tuple[int, int]) -> None:
        self.write_now(*where, False)

    def zero_now(self, offset: int, length: int) -> None:
        length = self.clip(offset, length)
        if length:
            self.make_room(3 * SECTOR)
            self.history.zero(self.timed(lambda: self.vol.core.zero(offset, length)), offset, length)

    @rule(where=areas(UNIT, 20 * SECTOR))
    def zero(self, where: tuple[int, int]) -> None:
        self.zero_now(*where)

    @rule(one=areas(SECTOR, SECTOR), other=areas(SECTOR, SECTOR))
    def discard(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        start, end = min(one[0], other[0]), max(one[0], other[0]) + SECTOR
        self.zero_now(start, end - start)

    @rule(where=areas(UNIT, 96 * SECTOR))
    def read(self, where: tuple[int, int]) -> None:
        length = self.clip(*where)
        if length:
            self.check_read(where[0], length)

    @rule(block=st.integers(0, 3071))
    def read_anywhere(self, block: int) -> None:
        """Blocks that nobody writes but a discard: zero, or what the base has."""
        if self.clip(block * BLOCK, BLOCK) == BLOCK and block * SECTORS not in self.history.versions:
            hot = any(
                first < (block + 1) * SECTORS and block * SECTORS < first + count for first, count in AREAS
            )
            if not hot:
                assert self.vol.core.pread(block * BLOCK, BLOCK) == bytes(BLOCK)

    @rule()
    def flush(self) -> None:
        begin = self.position()
        if self.sync_failed:
            with pytest.raises(CoreError):
                self.vol.core.flush()
        else:
            self.vol.core.flush()
            self.flushes.append((begin, self.position()))

    @rule(where=areas(SECTOR, 2 * SECTOR))
    def failed_flush(self, where: tuple[int, int]) -> None:
        """! Sticky until the store has what may be lost."""
        if self.sync_failed or not self.clip(*where):
            return
        self.write_now(*where, False)
        inject(SYNC, errno.EIO)
        with pytest.raises(CoreError):
            self.vol.core.flush()
        inject_nothing()
        self.sync_failed = True

    @rule(
        threads=st.lists(
            st.lists(
                st.tuples(
                    st.sampled_from(["write", "write", "zero", "flush"]),
                    st.integers(0, 31),
                    st.integers(1, 16),
                ),
                min_size=1,
                max_size=4,
            ),
            min_size=2,
            max_size=4,
        ),
        area=st.sampled_from(AREAS[:3]),
        aligned=st.booleans(),
        meanwhile=st.sampled_from(["nothing", "commit", "retire", "evict", "seal"]),
    )
    def concurrent(
        self, threads: list[list[tuple[str, int, int]]], area: tuple[int, int], aligned: bool, meanwhile: str
    ) -> None:
        """Overlapping writes: each part of a sector ends as one of the writers' values."""
        step = SECTOR if aligned else UNIT
        first = area[0] * SECTOR
        if self.clip(first, 48 * step) < 48 * step or self.sync_failed:
            return
        self.make_room(sum(length for ops in threads for _, _, length in ops) * step)
        plans = [
            [Op(kind, first + at * step, length * step, next(self.tags)) for kind, at, length in ops]
            for ops in threads
        ]
        barrier = threading.Barrier(len(plans) + 1)
        errors: list[BaseException] = []

        def run(plan: list[Op]) -> None:
            barrier.wait()
            try:
                for op in plan:
                    if op.kind == "write":
                        self.vol.core.pwrite(op.offset, tag_bytes(op.tag, op.length))
                    elif op.kind == "zero":
                        self.vol.core.zero(op.offset, op.length)
                    else:
                        self.vol.core.flush()
            except BaseException as error:
                errors.append(error)

        start, low = self.position(), self.segment_now()
        workers = [threading.Thread(target=run, args=(plan,)) for plan in plans]
        for worker in workers:
            worker.start()
        barrier.wait()
        stored: list[tuple[int, dict[int, bytes]]] = []
        if meanwhile in ("commit", "retire"):
            stored.append(self.upload(None))
            if meanwhile == "retire":
                self.vol.core.retire(stored[-1][0])
        elif meanwhile == "evict":
            self.rig.engine.cache.evict_all()
        elif meanwhile == "seal":
            self.vol.core.seal()
        deadline = time.monotonic() + 30
        while any(worker.is_alive() for worker in workers):
            workers[0].join(0.05)
            if all(not worker.is_alive() for worker in workers):
                break
            if self.vol.core.info().parked:  # the log is full: they wait for us
                stored.append(self.upload(None))
                self.vol.core.retire(stored[-1][0])
            assert time.monotonic() < deadline, "a request hangs"
            for worker in workers:
                worker.join(0.002)
        assert not errors, errors
        span = Span(start, self.position(), low, self.vol.core.info().last_seq)
        self.settle(plans, span)
        for segment, base in stored:
            self.check_store(segment, base)

    def settle(self, plans: list[list[Op]], span: Span) -> None:
        """Read what came out, check that it may, and go on from it."""
        last: dict[int, list[bytes]] = {}
        ever: dict[int, set[bytes]] = {}
        for plan in plans:
            mine: dict[int, bytes] = {}
            for op in plan:
                if op.kind == "flush":
                    continue
                data = tag_bytes(op.tag if op.kind == "write" else 0, op.length)
                for i in range(op.length // UNIT):
                    value = data[i * UNIT : (i + 1) * UNIT]
                    unit = op.offset // UNIT + i
                    mine[unit] = value
                    ever.setdefault(unit, set()).add(value)
            for unit, value in mine.items():
                last.setdefault(unit, []).append(value)
        for sector in sorted({unit // UNITS for unit in last}):
            got, old = self.vol.core.pread(sector * SECTOR, SECTOR), self.history.now(sector)
            loose = []
            for i in range(UNITS):
                unit, value, before = (
                    sector * UNITS + i,
                    got[i * UNIT : (i + 1) * UNIT],
                    old[i * UNIT : (i + 1) * UNIT],
                )
                may = last.get(unit, [before])
                assert value in may, (
                    f"sector {sector} + {i * UNIT} after concurrent writes: {value[:16].hex()}, "
                    f"not one of {[one[:16].hex() for one in may]}"
                )
                loose.append(frozenset(ever.get(unit, set()) | {before}))
            self.history.settle(span, sector, got, tuple(loose))

    # -- log and store ---------------------------------------------------------------------------

    @rule()
    def seal(self) -> None:
        self.vol.core.seal()

    @rule(retire=st.booleans())
    def commit(self, retire: bool) -> None:
        self.commit_now(retire=retire)

    @rule(share=st.floats(0, 1))
    def commit_some(self, share: float) -> None:
        """Only the oldest sealed segments: newer writes must not leak in."""
        info = self.vol.core.info()
        if info.sealed_seq > self.vol.committed_seq and not self.sync_failed:
            step = int((info.sealed_seq - self.vol.committed_seq) * share)
            self.commit_now(retire=False, segment=self.vol.committed_seq + max(1, step))

    @rule()
    def retire(self) -> None:
        self.vol.core.retire(self.vol.committed_seq)

    @rule()
    def thin(self) -> None:
        for found in self.vol.segments():
            with contextlib.suppress(CoreError):  # its disk fails
                self.vol.core.thin(int(found.path.stem, 16))

    @rule()
    def evict(self) -> None:
        self.rig.engine.cache.evict_all()

    @rule(
        size=st.sampled_from(
            [SIZE, 3071 * BLOCK + SECTOR, 2048 * BLOCK + 3 * SECTOR, 1024 * BLOCK, 2 * BLOCK + SECTOR]
        )
    )
    def resize(self, size: int) -> None:
        if self.sync_failed:
            return
        self.make_room(3 * SECTOR)
        old = self.size
        span = self.timed(lambda: self.vol.core.resize(size))
        if size < old:
            self.history.zero(span, size, old - size)
            self.flushes.append((span.start, span.end))
            for sector in self.history.versions:
                if size <= sector * SECTOR < old:
                    self.durable_now(sector, span.end)
        self.size = size
        self.sizes.append((span.end, size))

    # -- crashes ---------------------------------------------------------------------------------

    @rule(verify=st.booleans())
    def crash(self, verify: bool) -> None:
        """The process dies: everything acknowledged is there. Closing a volume syncs nothing."""
        self.vol.close()
        self.vol.open(size=self.size, always_verify=verify or self.other_boot)
        assert self.vol.recovery.dropped == 0 or self.other_boot
        self.check_all()

    @rule(
        back=st.floats(0, 1),
        keep=st.sampled_from(sorted(KEEPS)),
        seed=st.integers(0, 1 << 20),
        recent=st.booleans(),
    )
    def power_cut(self, back: float, keep: str, seed: int, recent: bool) -> None:
        """Everything flushed is there; of the rest, each sector is old or new, never torn or older."""
        raw = self.trace_path.read_bytes()
        records = read_trace(raw)
        at = self.cut_position(records, len(raw), back, recent)
        trace(None)
        self.vol.close()
        commit = [one for one in self.commits if one.at <= at][-1]
        self.size = [size for end, size in self.sizes if end <= at][-1]
        self.vol.base, self.vol.committed_seq = commit.base, commit.segment
        self.files = cut_power(self.dir, self.files, records, at, KEEPS[keep], random.Random(seed), note)
        trace(self.trace_path)
        self.other_boot = True
        self.vol.open(size=self.size, always_verify=True)
        self.recovered = self.vol.recovery.last_seq
        self.check_cut(at)
        self.sync_failed = any(
            name.endswith(".syncfail") and int(name[:16], 16) > commit.segment for name in self.files
        )
        if self.sync_failed:
            try:
                self.vol.core.flush()
                self.sync_failed = False  # the mark is there, its segment is not
            except CoreError:
                pass

    def cut_position(self, records: list[Record], end: int, back: float, recent: bool) -> int:
        if not records:
            return end
        window = records[-12:] if recent else records
        return window[int(back * (len(window) - 1))].at

    def check_cut(self, at: int) -> None:
        """Compare all hot sectors with what the history allows, and go on from what is there."""
        flushes = self.flushes
        for first, count in AREAS:
            length = self.clip(first * SECTOR, count * SECTOR)
            got = self.vol.core.pread(first * SECTOR, length) if length else b""
            for sector in range(first, first + count):
                if (sector - first + 1) * SECTOR > length:
                    # Beyond the end: a grow brings zeros, whatever was there before the shrink.
                    self.history.pin(sector, ZERO)
                    continue
                content = got[(sector - first) * SECTOR : (sector - first + 1) * SECTOR]
                may = self.history.after_cut(sector, at, flushes)
                floor = max((index for end, index in self.floors.get(sector, []) if end <= at), default=0)
                versions = self.history.versions[sector]
                may = [version for version in may if versions.index(version) >= floor]
                assert any(version.matches(content) for version in may), (
                    f"sector {sector} after a power cut at {at}: {show(content)}, "
                    f"not one of {[show(version.content) for version in may]}"
                )
                self.history.pin(sector, content)
        self.floors = {}
        self.flushes = []
        self.commits = [Commit(-1, self.vol.committed_seq, self.vol.base)]
        self.sizes = [(-1, self.size)]
