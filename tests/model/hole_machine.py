"""The state machine of holes: a volume of several pages, most of it absent, and answers that come late.

What is absent is told to the core by whole pages and chunks. An answer may be made of one state of the store
and land after any number of writes, discards, commits, retirements and resizes; whatever comes in between, a
read returns what was written last.
"""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from core_rig import CoreRig, Vol, holes_of_chunk, holes_of_page
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from glidefs.core.volume import GROUP, Holes

SECTOR = 4096
BLOCK = 131072
SECTORS = 32
CHUNK = GROUP * BLOCK
PAGE = GROUP * CHUNK
CHUNKS = [0, 1, 700, 1023, 1024, 2047, 2049]
"""Chunks that are written to: of three pages, at both sides of their borders."""
HOT = [chunk * GROUP + block for chunk in CHUNKS for block in (0, 1, 1023)]
SIZE = 2 * PAGE + 2 * CHUNK
SIZES = [SIZE, SIZE - CHUNK, 2 * PAGE, PAGE + CHUNK, PAGE + 5 * BLOCK, 701 * CHUNK + SECTOR, CHUNK + BLOCK]

_rig: CoreRig | None = None
_numbers = itertools.count(1)


def shared_rig() -> CoreRig:
    """The engine of all examples."""
    global _rig
    if _rig is None:
        home = Path(tempfile.mkdtemp(prefix="glidefs-holes-"))
        _rig = CoreRig(home, segment_bytes=64 * SECTOR, cache_bytes=12 * BLOCK, map_budget=8 << 20)
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        atexit.register(_rig.close)
    return _rig


class Late(NamedTuple):
    """An answer that was made and did not land yet."""

    stamp: int
    holes: Holes


def content(tag: int) -> bytes:
    """A sector that nobody else writes; tag 0 is zeros."""
    return tag.to_bytes(8, "little") * (SECTOR // 8)


class HoleMachine(RuleBasedStateMachine):
    """Rules drive the core; every read is checked, and every hot block at the end of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = shared_rig()
        self.dir = self.rig.tmp / f"log{next(_numbers)}" / "id"
        self.tags = itertools.count(1)
        self.sectors: dict[int, int] = {}
        self.late: list[Late] = []
        self.size = SIZE

    @initialize(blocks=st.sets(st.sampled_from(HOT), max_size=6))
    def create(self, blocks: set[int]) -> None:
        self.vol = Vol(self.rig, self.dir, SIZE)
        for block in blocks:
            tag = next(self.tags)
            self.vol.base[block] = content(tag) * SECTORS
            self.sectors.update((block * SECTORS + i, tag) for i in range(SECTORS))
        self.vol.open()

    def teardown(self) -> None:
        try:
            if hasattr(self, "vol"):
                for block in HOT:
                    self.check(block)
        finally:
            if hasattr(self, "vol"):
                self.vol.close()
            shutil.rmtree(self.dir.parent, ignore_errors=True)

    def within(self, block: int, sector: int = 0) -> bool:
        return block * BLOCK + (sector + 1) * SECTOR <= self.size

    def check(self, block: int) -> None:
        length = min(BLOCK, self.size - block * BLOCK) // SECTOR * SECTOR
        if length <= 0:
            return
        first = block * SECTORS
        want = b"".join(content(self.sectors.get(first + i, 0)) for i in range(length // SECTOR))
        got = self.vol.core.pread(block * BLOCK, length)
        assert got == want, f"block {block}: sector tags {[_tag(got, i) for i in range(length // SECTOR)]}"

    @rule(block=st.sampled_from(HOT), sector=st.integers(0, 31), count=st.integers(1, 4))
    def write(self, block: int, sector: int, count: int) -> None:
        for at in range(sector, min(sector + count, SECTORS)):
            if self.within(block, at):
                tag = next(self.tags)
                self.vol.core.pwrite(block * BLOCK + at * SECTOR, content(tag))
                self.sectors[block * SECTORS + at] = tag

    def zeroed(self, start: int, end: int) -> None:
        for sector in [at for at in self.sectors if start <= at * SECTOR < end]:
            del self.sectors[sector]

    @rule(block=st.sampled_from(HOT), sector=st.integers(0, 31), count=st.integers(1, 40))
    def zero(self, block: int, sector: int, count: int) -> None:
        start = block * BLOCK + sector * SECTOR
        self.zero_bytes(start, start + count * SECTOR)

    @rule(one=st.sampled_from(CHUNKS), other=st.sampled_from(CHUNKS))
    def discard(self, one: int, other: int) -> None:
        self.zero_bytes(min(one, other) * CHUNK, (max(one, other) + 1) * CHUNK)

    def zero_bytes(self, start: int, end: int) -> None:
        end = min(end, self.size)
        if start < end:
            self.vol.core.zero(start, end - start)
            self.zeroed(start, end)

    @rule(block=st.sampled_from(HOT))
    def read(self, block: int) -> None:
        self.check(block)

    @rule(chunk=st.integers(0, SIZE // CHUNK - 1), block=st.integers(2, 1022))
    def read_cold(self, chunk: int, block: int) -> None:
        """What nobody ever wrote."""
        block += chunk * GROUP
        if self.within(block, 31):
            assert self.vol.core.pread(block * BLOCK, BLOCK) == bytes(BLOCK)

    @rule(retire=st.booleans())
    def commit(self, retire: bool) -> None:
        self.vol.commit(retire=retire)

    @rule()
    def retire(self) -> None:
        self.vol.core.retire(self.vol.committed_seq)

    @rule()
    def evict(self) -> None:
        self.rig.engine.cache.evict_all()

    @rule(size=st.sampled_from(SIZES))
    def resize(self, size: int) -> None:
        if size < self.size:
            self.zeroed(size, self.size)
        self.vol.core.resize(size)
        self.size = size

    @rule()
    def restart(self) -> None:
        """A process that knows nothing of holes; what was made for the one before is lost."""
        self.late = []
        self.vol.close()
        self.vol.open(size=self.size)

    @rule(chunk=st.sampled_from(CHUNKS), page=st.booleans())
    def answer(self, chunk: int, page: bool) -> None:
        """The stamp is taken before the manifest is read."""
        stamp, base = self.vol.core.stamp(), self.vol.base
        holes = holes_of_page(base, chunk // GROUP) if page else holes_of_chunk(base, chunk)
        self.late.append(Late(stamp, holes))

    @rule(which=st.integers(0, 100))
    def land(self, which: int) -> None:
        if self.late:
            late = self.late.pop(which % len(self.late))
            self.vol.core.install_holes(late.stamp, [late.holes])

    @rule(block=st.sampled_from(HOT), page=st.booleans(), late=st.booleans())
    def overtaken(self, block: int, page: bool, late: bool) -> None:
        """A block changes in the store after an answer that says what it was, or before that lands."""
        self.answer(block // GROUP, page)
        if not late:
            self.land(len(self.late) - 1)
        self.write(block, 0, 1)
        self.commit(True)
        if late:
            self.land(len(self.late) - 1)
        self.check(block)


def _tag(data: bytes, sector: int) -> int:
    return int.from_bytes(data[sector * SECTOR : sector * SECTOR + 8], "little")
