"""The state machine of what changed: a volume of two manifest pages, its snapshots, and their NBD contexts.

After any history, each context is compared with the two images, that of the volume and that of the snapshot
as the store has it. A sector that differs must be said to have changed; and nothing may be said to that
nobody wrote since, but for blocks that compaction made one payload of. A client stays connected, so answers
are also made of what it was told before.
"""

from __future__ import annotations

import atexit
import itertools
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from nbd_client import Extent, RawClient
from volume_rig import PREFIX, Rig, record_of

from glidefs.core.volume import NbdModes
from glidefs.exports.copies.pins import kept_copy
from glidefs.formats.manifest import PAGE_BYTES, Root, decode_root, encode_root
from glidefs.formats.pack import CHUNK
from glidefs.names import snapshot_key
from glidefs.reading import changed
from glidefs.store.memory import MemoryStore

SECTOR = 4096
BLOCK = 131072
SECTORS = 32
CHUNK_BLOCKS = CHUNK // BLOCK
PAGE_BLOCKS = PAGE_BYTES // BLOCK
HOT = [0, 1, 5, 1023, 1024, PAGE_BLOCKS - 1, PAGE_BLOCKS, PAGE_BLOCKS + 1025, PAGE_BLOCKS + 2048]
"""Blocks that are written to, in five chunks of two pages; of the last one only three sectors exist."""
SIZE = PAGE_BYTES + 2 * CHUNK + 3 * SECTOR
SIZES = [SIZE, SIZE + CHUNK, PAGE_BYTES + BLOCK, PAGE_BYTES, CHUNK + SECTOR, CHUNK, 5 * BLOCK + 7 * SECTOR]
MOST = 3
"""Snapshots at a time."""
PATIENCE = 30

_rig: Rig | None = None
_host: Any = None


def shared_host() -> tuple[Rig, Any]:
    """The host of all examples. Any two packs of a chunk are compacted."""
    global _rig, _host
    if _rig is None:
        home = Path(tempfile.mkdtemp(prefix="glidefs-changed-"))
        _rig = Rig(home, MemoryStore())
        _host = _rig.host(
            engine={"segment_bytes": 64 * SECTOR, "cache_bytes": 16 << 20}, compact_width=2, settle_width=1
        )
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        atexit.register(_rig.stop, _host)
    return _rig, _host


class Snapshot:
    """What the volume held, and what was done to it since."""

    def __init__(self, root: Root, sectors: dict[int, bytes]) -> None:
        self.root = root
        self.sectors = dict(sectors)
        self.written: list[tuple[int, int]] = []  # sectors [first, end)
        self.merged: set[int] = set()  # blocks of which compaction made one payload of several

    def may_say(self, first: int, end: int) -> bool:
        """Whether all of these sectors were written since, or merged."""
        merged = [(block * SECTORS, (block + 1) * SECTORS) for block in self.merged]
        for start, stop in sorted(self.written + merged):
            if start <= first < stop:
                first = stop
        return first >= end


LIMITS = (changed.MAX_EDGES, changed.MAX_CHUNKS)


class ChangedMachine(RuleBasedStateMachine):
    """Rules drive a volume on the real host; contexts are compared at any time, and in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.rig, self.host = shared_host()
        self.sectors: dict[int, bytes] = {}
        self.snapshots: dict[int, Snapshot] = {}
        self.tags = itertools.count(1)
        self.numbers = itertools.count(1)
        self.size = SIZE
        self.client: RawClient | None = None
        changed.MAX_EDGES, changed.MAX_CHUNKS = LIMITS

    @initialize()
    def create(self) -> None:
        self.volume = self.rig.create(self.host, SIZE)

    def teardown(self) -> None:
        changed.MAX_EDGES, changed.MAX_CHUNKS = LIMITS  # other tests of this process come after
        if not hasattr(self, "volume"):
            return
        try:
            self.look()
            self.look_at_images()
        finally:
            self.hang_up()
            for number in self.snapshots:
                self.rig.memory.delete(snapshot_key(PREFIX, self.volume.name, number))
            self.volume.close()

    # -- the client ------------------------------------------------------------------------------------

    def hang_up(self) -> None:
        if self.client is not None:
            self.client.close()
        self.client = None

    def connected(self) -> RawClient:
        if self.client is None:
            mine, theirs = socket.socketpair()
            modes = NbdModes(structured=True, allocation=True, changed=tuple(self.snapshots))
            self.volume.core.attach_nbd(theirs.detach(), next(self.numbers), modes)
            self.client = RawClient(mine)
        return self.client

    @rule()
    def look(self) -> None:
        client = self.connected()
        for context, snapshot in enumerate(self.snapshots.values(), 2):
            self.compare(client.map_of(context, self.size), snapshot)

    @rule(block=st.sampled_from(HOT), sector=st.integers(0, 31), count=st.integers(1, 64))
    def look_at_a_part(self, block: int, sector: int, count: int) -> None:
        """A request in the middle, of all contexts at once; the window is from wherever the last one was."""
        start = (block * SECTORS + sector) * SECTOR
        length = min(count * SECTOR, self.size - start)
        if length > 0:
            said = self.connected().statuses(start, length)
            assert list(said) == [1, *range(2, 2 + len(self.snapshots))]
            for context, snapshot in enumerate(self.snapshots.values(), 2):
                self.compare(said[context], snapshot, start)

    def compare(self, extents: list[Extent], snapshot: Snapshot, start: int = 0) -> None:
        """! No sector that differs is unchanged, and none is changed that nobody wrote."""
        at = start // SECTOR
        said: list[tuple[int, int]] = []
        for extent in extents:
            assert extent.flags in (0, 1)
            assert extent.length % SECTOR == 0
            end = at + extent.length // SECTOR
            if extent.flags:
                assert snapshot.may_say(at, end), f"sectors {at} to {end} were not written"
                said.append((at, end))
            at = end
        for sector in self.sectors.keys() | snapshot.sectors.keys():
            if start // SECTOR <= sector < at and self.sectors.get(sector) != snapshot.sectors.get(sector):
                assert any(first <= sector < end for first, end in said), f"sector {sector} has changed"

    @rule()
    def look_at_images(self) -> None:
        """That the model is right: the volume, and each snapshot by the store alone."""
        self.compare_image(self.volume.core, self.sectors, self.size)
        for snapshot in self.snapshots.values():
            root = snapshot.root
            view = self.host.open(record_of(root, read_only=True), root, None)
            try:
                self.compare_image(view.core, snapshot.sectors, root.size)
            finally:
                view.close()

    def compare_image(self, core: Any, sectors: dict[int, bytes], size: int) -> None:
        for block in HOT:
            length = min(BLOCK, size - block * BLOCK)
            if length > 0:
                want = (sectors.get(block * SECTORS + i, bytes(SECTOR)) for i in range(length // SECTOR))
                assert core.pread(block * BLOCK, length) == b"".join(want), f"block {block}"

    # -- requests --------------------------------------------------------------------------------------

    def note(self, first: int, end: int) -> None:
        for snapshot in self.snapshots.values():
            snapshot.written.append((first, end))

    @rule(block=st.sampled_from(HOT), sector=st.integers(0, 31), count=st.integers(1, 33), same=st.booleans())
    def write(self, block: int, sector: int, count: int, same: bool) -> None:
        first = block * SECTORS + sector
        end = min(first + count, (block + 1) * SECTORS, self.size // SECTOR)
        for at in range(first, end):
            if not same:
                self.sectors[at] = next(self.tags).to_bytes(8, "little") * (SECTOR // 8)
        if first < end:
            data = b"".join(self.sectors.get(at, bytes(SECTOR)) for at in range(first, end))
            self.volume.core.pwrite(first * SECTOR, data)
            self.note(first, end)

    def zero_sectors(self, first: int, end: int) -> None:
        end = min(end, self.size // SECTOR)
        if first < end:
            self.volume.core.zero(first * SECTOR, (end - first) * SECTOR)
            self.forget_sectors(first, end)

    def forget_sectors(self, first: int, end: int) -> None:
        for sector in [at for at in self.sectors if first <= at < end]:
            del self.sectors[sector]
        self.note(first, end)

    @rule(block=st.sampled_from(HOT), sector=st.integers(0, 31), count=st.integers(1, 64))
    def zero(self, block: int, sector: int, count: int) -> None:
        self.zero_sectors(block * SECTORS + sector, block * SECTORS + sector + count)

    @rule(one=st.sampled_from(HOT), other=st.sampled_from(HOT))
    def discard(self, one: int, other: int) -> None:
        low, high = min(one, other) // CHUNK_BLOCKS, max(one, other) // CHUNK_BLOCKS + 1
        self.zero_sectors(low * CHUNK // SECTOR, high * CHUNK // SECTOR)

    @rule(size=st.sampled_from(SIZES))
    def resize(self, size: int) -> None:
        """! What a shrink cuts off has changed; what a grow brings has not."""
        if size < self.size:
            self.forget_sectors(size // SECTOR, self.size // SECTOR)
        self.volume.resize(size)
        self.size = size

    # -- log, store and snapshots --------------------------------------------------------------------------

    @rule()
    def drain(self) -> None:
        self.volume.drain(PATIENCE)

    @rule(drained=st.booleans())
    def retire(self, drained: bool) -> None:
        """! A window that was made before does not hide what the log gives back."""
        if drained:
            self.volume.drain(PATIENCE)
        self.volume.retire_committed()

    @rule(settle=st.booleans())
    def compact(self, settle: bool) -> None:
        """! Packs that move change nothing, as far as that can be told."""
        self.volume.drain(PATIENCE)
        manifest = self.volume.manifest(self.host.store)
        for block in HOT:
            found = [manifest.index(ref).find(block) for ref in manifest.packs(block // CHUNK_BLOCKS)]
            if sum(entry is not None for entry in found) > 1:
                for snapshot in self.snapshots.values():
                    snapshot.merged.add(block)
        self.host.compactor.compact(self.volume, settle=settle)

    @rule()
    def snapshot(self) -> None:
        if len(self.snapshots) < MOST:
            self.volume.drain(PATIENCE)
            number = next(self.numbers)
            copy, key = kept_copy(self.volume.root), snapshot_key(PREFIX, self.volume.name, number)
            self.rig.memory.put(key, encode_root(copy, key))
            stored = decode_root(key, self.rig.memory.get(key).data)
            self.snapshots[number] = Snapshot(stored, self.sectors)
            self.hang_up()

    @rule(
        block=st.sampled_from(HOT),
        zeroed=st.booleans(),
        count=st.sampled_from([1, 3, 32]),
        ends=st.lists(st.sampled_from(["drain", "retire", "restart", "resize", "compact"]), max_size=3),
    )
    def change_what_a_snapshot_has(self, block: int, zeroed: bool, count: int, ends: list[str]) -> None:
        """! Told in the log and, whatever becomes of that, afterwards."""
        self.write(block, 0, 32, False)
        self.snapshot()
        self.look()
        if zeroed:
            self.zero(block, 0, count)
        else:
            self.write(block, 0, count, False)
        self.look()
        for end in ends:
            if end == "resize":
                self.resize(SIZES[block % len(SIZES)])
            elif end == "restart":
                self.restart()
            elif end == "compact":
                self.compact(True)
            elif end == "retire":
                self.retire(True)
            else:
                self.drain()
            self.look()

    @rule(which=st.integers(0, MOST - 1))
    def delete_snapshot(self, which: int) -> None:
        if self.snapshots:
            number = sorted(self.snapshots)[which % len(self.snapshots)]
            self.rig.memory.delete(snapshot_key(PREFIX, self.volume.name, number))
            del self.snapshots[number]
            self.hang_up()

    @rule()
    def restart(self) -> None:
        """A process that has no windows, and a log that may lack what is committed."""
        self.hang_up()
        root = self.volume.root
        self.volume.close()
        self.volume = self.rig.reopen(self.host, root)
        if self.volume.size != self.size:  # the export record, which this rig does not keep, has the size
            self.volume.resize(self.size)

    @rule()
    def evict(self) -> None:
        self.host.engine.cache.evict_all()
        self.host.meta.indices.clear()
        self.host.meta.pages.clear()

    @rule(edges=st.sampled_from([1, 2, 3, 4096]), chunks=st.sampled_from([1, 2, 256]))
    def limits(self, edges: int, chunks: int) -> None:
        """Answers end early, in the middle of a chunk or between two."""
        changed.MAX_EDGES, changed.MAX_CHUNKS = edges, chunks
