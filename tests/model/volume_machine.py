"""The state machine over two hosts that share a store: the real uploader, reader, compactor and leases.

One volume moves between the hosts by detach and attach, take-over, crash and power cut. The store alone
must always hold it as at the end of some segment of its owner's log.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import itertools
import os
import random
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from core_rig import trace
from core_world import AREAS, BLOCK, SECTORS, SIZE, areas, show
from history import SECTOR, UNIT, ZERO, History, Span, Version, tag_bytes
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from power_cut import KEEPS, cut_power, read_trace
from volume_rig import PREFIX, Rig, demote_all, record_of
from waiting import wait_for

from glidefs.core.check import CoreError
from glidefs.core.volume import VolumeConfig
from glidefs.errors import Fenced
from glidefs.formats.manifest import Root
from glidefs.host import host as host_module
from glidefs.host.host import Host
from glidefs.manifest import lease
from glidefs.store.memory import MemoryStore
from glidefs.volume.volume import DrainTimeout, Volume

SEGMENT_SECTORS = 12
PATIENCE = 120.0

_rig: tuple[Rig, dict[str, Host]] | None = None
_numbers = itertools.count(1)


def shared_hosts() -> tuple[Rig, dict[str, Host]]:
    global _rig
    if _rig is None:
        where = "/dev/shm" if os.path.isdir("/dev/shm") else None
        home = Path(tempfile.mkdtemp(prefix="glidefs-volume-model-", dir=where))
        rig = Rig(home, MemoryStore())
        engine = {
            "segment_bytes": SEGMENT_SECTORS * SECTOR,
            "log_limit": 64 * SEGMENT_SECTORS * (SECTOR + 32),
            "map_budget": 128 << 10,
            "cache_bytes": 8 * BLOCK,
        }
        hosts = {
            node: rig.host(
                node, engine=engine, pack_bytes=256 << 10, read_ahead_bytes=0, retire_segments=8, backoff=0.01
            )
            for node in ("a", "b")
        }
        _rig = rig, hosts

        def end() -> None:
            for host, core in rig.live:
                host.close()
                core.close()
            shutil.rmtree(home, ignore_errors=True)

        atexit.register(end)
    return _rig


class VolumeMachine(RuleBasedStateMachine):
    """Every read of the owner is exact; what the store has is checked against the segments it names."""

    def __init__(self) -> None:
        super().__init__()
        self.rig, self.hosts = shared_hosts()
        self.trace_path = self.rig.tmp / "trace"
        self.tags = itertools.count(1)
        self.files: dict[str, bytes] = {}
        self.flushes: list[tuple[int, int]] = []
        self.known_from = 0
        # After a cut another boot reads the log, which checks what it reads; here the boot is the same.
        host_module.VolumeConfig = partial(VolumeConfig, always_verify=True)
        trace(self.trace_path)

    @initialize(written=st.booleans())
    def create(self, written: bool) -> None:
        self.rig.differences.lines.clear()
        self.node = "a"
        self.size = SIZE
        self.volume = self.rig.create(self.host, SIZE, name=f"model{next(_numbers)}")
        self.history = History(AREAS, {})
        if written:
            for first, count in AREAS:
                self.write_now(first * SECTOR, count * SECTOR, False)
            self.volume.drain(PATIENCE)

    @property
    def host(self) -> Host:
        return self.hosts[self.node]

    @property
    def other(self) -> str:
        return "b" if self.node == "a" else "a"

    def teardown(self) -> None:
        self.rig.memory.set_down(False)
        try:
            if hasattr(self, "history"):
                self.check_all(self.volume)
                self.check_store()
        finally:
            trace(None)
            host_module.VolumeConfig = VolumeConfig
            for host in self.hosts.values():
                for volume in host.volumes():
                    volume.close()
            if hasattr(self, "volume"):
                for host in self.hosts.values():
                    shutil.rmtree(self.volume.log_dir.parent, ignore_errors=True)
                    host.forget_state(self.volume.id)
            for info in list(self.rig.memory.list("")):
                self.rig.memory.delete(info.key)
        assert not self.rig.differences.lines

    # -- helpers ---------------------------------------------------------------------------------

    def position(self) -> int:
        return self.trace_path.stat().st_size

    def clip(self, offset: int, length: int) -> int:
        return max(0, min(length, self.size - offset))

    def timed(self, action: Any) -> Span:
        info = self.volume.core.info()
        start, low = self.position(), max(info.sealed_seq, info.committed_seq) + 1
        action()
        info = self.volume.core.info()
        return Span(start, self.position(), low, max(low, info.last_seq, info.committed_seq))

    def check_all(self, volume: Volume) -> None:
        for first, count in AREAS:
            length = self.clip(first * SECTOR, count * SECTOR)
            if length:
                self.check_read(volume, first * SECTOR, length)

    def check_read(self, volume: Volume, offset: int, length: int) -> None:
        got, want = volume.core.pread(offset, length), self.history.expected(offset, length)
        for at in range(0, length, UNIT):
            assert got[at : at + UNIT] == want[at : at + UNIT], (
                f"sector {(offset + at) // SECTOR} + {(offset + at) % SECTOR}: "
                f"{got[at : at + 16].hex()}, not {want[at : at + 16].hex()}"
            )

    def contents(self, volume: Volume, size: int) -> dict[int, bytes]:
        """The hot sectors of a volume; those beyond ``size`` are left out."""
        found: dict[int, bytes] = {}
        for first, count in AREAS:
            length = max(0, min(count * SECTOR, size - first * SECTOR))
            data = volume.core.pread(first * SECTOR, length) if length else b""
            for i in range(length // SECTOR):
                found[first + i] = data[i * SECTOR : (i + 1) * SECTOR]
        return found

    def check_prefix(self, found: dict[int, bytes], segment: int) -> None:
        if segment < self.known_from:
            return
        for sector, content in found.items():
            self.check_one(sector, content, self.history.in_commit(sector, segment), f"at segment {segment}")

    def check_one(self, sector: int, content: bytes, may: list[Version], when: str) -> None:
        assert any(version.matches(content) for version in may), (
            f"sector {sector} {when}: {show(content)}, not one of {[show(v.content) for v in may]}"
        )

    def new_log(self, found: dict[int, bytes], size: int) -> None:
        """The volume starts over in another log, from what was found."""
        self.size = size
        for sector in self.history.versions:
            self.history.pin(sector, found.get(sector, ZERO))
        self.flushes = []
        self.known_from = 0
        self.files = {}
        trace(self.trace_path)

    def stored_root(self) -> Root:
        return lease.read_root(self.host.store, PREFIX, self.volume.name)[0]

    def snapshot(self, root: Root) -> dict[int, bytes]:
        """What another host reads from the store alone."""
        copy = self.hosts[self.other].open(record_of(root, read_only=True), root, None)
        try:
            return self.contents(copy, root.size)
        finally:
            copy.close()

    # -- requests --------------------------------------------------------------------------------

    def write_now(self, offset: int, length: int, fua: bool) -> None:
        length = self.clip(offset, length)
        if not length:
            return
        data = tag_bytes(next(self.tags), length)
        span = self.timed(lambda: self.volume.core.pwrite(offset, data, fua=fua))
        self.history.write(span, offset, data)
        if fua:
            self.flushes.append((span.end, span.end))

    @rule(where=areas(SECTOR, 40 * SECTOR), fua=st.booleans())
    def write(self, where: tuple[int, int], fua: bool) -> None:
        self.write_now(*where, fua)

    @rule(where=areas(UNIT, 9 * SECTOR))
    def write_unaligned(self, where: tuple[int, int]) -> None:
        self.write_now(*where, False)

    @rule(where=areas(SECTOR, 4 * SECTOR))
    def write_small(self, where: tuple[int, int]) -> None:
        self.write_now(*where, False)

    def zero_now(self, offset: int, length: int) -> None:
        length = self.clip(offset, length)
        if length:
            self.history.zero(self.timed(lambda: self.volume.core.zero(offset, length)), offset, length)

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
            self.check_read(self.volume, where[0], length)

    @rule()
    def flush(self) -> None:
        begin = self.position()
        self.volume.core.flush()
        self.flushes.append((begin, self.position()))

    # -- log and store ---------------------------------------------------------------------------

    @rule()
    def seal(self) -> None:
        self.volume.core.seal()

    @rule(lost=st.booleans())
    def drain(self, lost: bool) -> None:
        """! An answer that was lost is found to be our own commit."""
        if lost:
            self.rig.memory.lose_answers("put", 1)
        begin = self.position()
        self.volume.drain(PATIENCE)
        self.rig.memory.lose_answers("put", 0)
        self.flushes.append((begin, self.position()))
        assert not self.volume.fenced

    @rule(settle=st.booleans())
    def compact(self, settle: bool) -> None:
        self.host.compactor.compact(self.volume, settle=settle)

    @rule(demoted=st.booleans())
    def retire(self, demoted: bool) -> None:
        if demoted:
            demote_all(self.host, self.volume)
        self.volume.retire_committed()

    @rule()
    def evict(self) -> None:
        for host in self.hosts.values():
            host.engine.cache.evict_all()
            host.meta.indices.clear()

    @rule(where=areas(SECTOR, 4 * SECTOR))
    def outage(self, where: tuple[int, int]) -> None:
        """Writes and flushes go on without the store."""
        config = self.host.engine.config
        if self.host.engine.stats().log_bytes > config.log_limit // 2 or not self.clip(*where):
            return
        self.rig.memory.set_down(True)
        try:
            self.write_now(*where, False)
            self.flush()
            with pytest.raises(DrainTimeout):
                self.volume.drain(0.02)
        finally:
            self.rig.memory.set_down(False)

    @rule(size=st.sampled_from([SIZE, 3071 * BLOCK + SECTOR, 2048 * BLOCK + 3 * SECTOR, 2 * BLOCK + SECTOR]))
    def resize(self, size: int) -> None:
        old = self.size
        span = self.timed(lambda: self.volume.resize(size))
        if size < old:
            self.history.zero(span, size, old - size)
        self.size = size

    @rule()
    def check_store(self) -> None:
        """From the store alone the volume is what it was at the end of a segment: a prefix."""
        root = self.stored_root()
        self.check_prefix(self.snapshot(root), root.last_segment)

    # -- moves -----------------------------------------------------------------------------------

    @rule()
    def crash(self) -> None:
        """The process dies and starts again: everything acknowledged is there."""
        root = self.volume.root
        self.volume.close()
        self.volume = self.reopened(root)
        self.check_all(self.volume)

    def reopened(self, root: Root) -> Volume:
        volume = self.rig.reopen(self.host, root)
        if volume.size != self.size:  # the export record, which this rig does not keep, has the size
            volume.resize(self.size)
        return volume

    @rule(keep=st.sampled_from(sorted(KEEPS)), seed=st.integers(0, 1 << 20))
    def power_cut(self, keep: str, seed: int) -> None:
        """Everything flushed is there; everything committed, too."""
        root, log_dir = self.volume.root, self.volume.log_dir
        at = self.position()
        self.volume.close()
        trace(None)
        raw = self.trace_path.read_bytes()
        self.files = cut_power(
            log_dir, self.files, read_trace(raw), len(raw), KEEPS[keep], random.Random(seed), note
        )
        trace(self.trace_path)
        self.volume = self.reopened(root)
        for sector, content in self.contents(self.volume, self.size).items():
            self.check_one(
                sector, content, self.history.after_cut(sector, at, self.flushes), "after a power cut"
            )
            self.history.pin(sector, content)
        for sector in self.history.versions:
            if (sector + 1) * SECTOR > self.size:
                self.history.pin(sector, ZERO)
        self.flushes = []
        self.known_from = self.volume.core.info().last_seq

    @rule(to_other=st.booleans())
    def move(self, to_other: bool) -> None:
        """Detach and attach: the next owner has all."""
        volume = self.volume
        volume.drain(PATIENCE)
        volume.close()
        lease.detach(self.host.store, PREFIX, volume.root, volume.etag or "")
        self.host.forget_state(volume.id)
        if to_other:
            self.node = self.other
        self.volume = self.rig.attach(self.host, volume.name)
        self.check_all(self.volume)
        self.new_log(self.contents(self.volume, self.size), self.size)

    @rule(where=areas(SECTOR, 4 * SECTOR))
    def take_over(self, where: tuple[int, int]) -> None:
        """The other host takes the volume as the store has it; the first is fenced and harms nothing."""
        old, before = self.volume, self.stored_root()
        self.node = self.other
        new = self.rig.attach(self.host, old.name, take_over=True)
        found = self.contents(new, new.size)
        if new.root.sequence == before.sequence + 1:
            self.check_prefix(found, before.last_segment)
        if self.clip(*where):
            with contextlib.suppress(CoreError):  # it may have learnt already
                old.core.pwrite(where[0], tag_bytes(next(self.tags), self.clip(*where)))
        try:
            old.drain(PATIENCE)  # has nothing to commit ...
            with pytest.raises(Fenced):
                self.hosts[self.other].uploader.poll(old)
        except Fenced:  # ... or finds out
            wait_for(lambda: old.core.info().failed == errno.EIO, "a fenced volume fails")
        old.close()
        self.volume = new
        assert self.contents(new, new.size) == found
        self.new_log(found, new.size)


__all__ = ["SECTORS", "VolumeMachine"]
