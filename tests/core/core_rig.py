"""The C core without a store: an engine with small limits, volumes over a base in memory, and the
threads that answer their faults.

The base of a volume is a dict from block to 128 KiB (absent = zero); :meth:`Vol.commit` is an uploader
in a few lines: gather sealed segments, apply them to the base, tell the core.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from glidefs.core._core import ffi, lib
from glidefs.core.check import Closed, CoreError
from glidefs.core.engine import Engine, EngineConfig, Fault
from glidefs.core.gather import Gather
from glidefs.core.payloads import overlay
from glidefs.core.shadow import ShadowFile
from glidefs.core.volume import (
    GROUP,
    Changed,
    CoreVolume,
    Fill,
    Holes,
    Install,
    Recovery,
    VolumeConfig,
    chunk_holes,
    holes_error,
    install_error,
    install_retry,
    install_slot,
    page_holes,
)

SECTOR = 4096
BLOCK = 131072
SECTORS = BLOCK // SECTOR
MIB = 1 << 20

# enum disk_kind
CREATE, WRITE, SYNC, SYNC_END, DIR, DIR_END, UNLINK, RENAME = range(1, 9)
READ, CACHE_READ, CACHE_WRITE, CACHE_SYNC, ALLOCATE = range(11, 16)

faulthandler.enable()

SANITIZED = "libasan" in Path("/proc/self/maps").read_text(encoding="utf-8")
"""Whether the core is a sanitizer's build: programs that a test starts cannot load it then."""


def inject(kind: int, err: int, *, skip: int = 0, count: int = 1) -> None:
    """Fail ``count`` disk operations of ``kind``, process-wide."""
    assert lib.glide_disk_inject(kind, err, skip, count) == 0


@contextlib.contextmanager
def rigs(directory: Path) -> Iterator[Callable[..., CoreRig]]:
    """Makes engines with options of the test's choice; closed in the end, with what was injected undone."""
    made: list[CoreRig] = []

    def make(**config: Any) -> CoreRig:
        made.append(CoreRig(directory, **config))
        return made[-1]

    yield make
    inject_nothing()
    trace(None)
    for rig in made:
        rig.close()


def inject_nothing() -> None:
    for kind in range(CREATE, ALLOCATE + 1):
        inject(kind, 0, count=0)


def trace(path: Path | None) -> None:
    """Record what reaches the log directories in ``path``; None ends it."""
    assert lib.glide_disk_trace(ffi.NULL if path is None else os.fsencode(path)) == 0


def pattern(seed: int, length: int) -> bytes:
    """Bytes that differ from sector to sector and from seed to seed."""
    out = bytearray()
    for at in range(0, length, 512):
        out += (seed.to_bytes(8, "little") + at.to_bytes(8, "little")) * 32
    return bytes(out[:length])


class Segment:
    """Byte offsets of a segment file, for tests that damage one."""

    def __init__(self, path: Path, sectors: int) -> None:
        self.path = path
        self.sectors = sectors
        self.journal = -(-sectors * 32 // SECTOR) * SECTOR

    def record_at(self, index: int) -> int:
        return 2 * SECTOR + index * 32

    def data_at(self, index: int) -> int:
        return 2 * SECTOR + self.journal + index * SECTOR

    def flip(self, offset: int, bit: int = 1) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ bit]))


class Vol:
    """An open volume, its base, and what is needed to open it again."""

    def __init__(self, rig: CoreRig, directory: Path, size: int, **config: Any) -> None:
        self.rig = rig
        self.dir = directory
        self.base: dict[int, bytes] = {}
        self.committed_seq = 0
        self.config: dict[str, Any] = {"size": size, "volume_id": b"v" * 16, "log_id": b"l" * 16}
        self.config.update(config)
        self.core: CoreVolume
        self.recovery: Recovery
        self.fault_errno = 0
        self.windows: Callable[[Fault], Changed | int] = lambda fault: errno.ENOENT
        """What changed since a snapshot, or the errno of the answer."""
        self.shadow: ShadowFile | None = None
        """Given to the next open."""

    def open(self, **changes: Any) -> Vol:
        self.config.update(changes)
        cookie = next(self.rig.cookies)
        self.rig.vols[cookie] = self
        config = VolumeConfig(
            cookie=cookie, log_dir=self.dir, committed_seq=self.committed_seq, **self.config
        )
        try:
            self.core, self.recovery = self.rig.engine.open_volume(config, self.shadow)
        except BaseException:
            del self.rig.vols[cookie]
            raise
        self.cookie = cookie
        return self

    def config_without_size(self) -> dict[str, Any]:
        """What another :class:`Vol` of the same log is made with."""
        return {key: value for key, value in self.config.items() if key != "size"}

    def close(self) -> None:
        self.core.close()
        self.rig.vols.pop(self.cookie, None)

    def reopen(self, **changes: Any) -> Vol:
        """What a crash of the process leaves: closing syncs nothing."""
        self.close()
        return self.open(**changes)

    def segments(self) -> list[Segment]:
        sectors = self.rig.engine.config.segment_bytes // SECTOR
        return [Segment(path, sectors) for path in sorted(self.dir.glob("*.seg"))]

    def gather(self, last: int) -> Gather:
        return Gather(
            self.core, self.dir, self.config["volume_id"], self.config["log_id"], self.committed_seq + 1, last
        )

    def commit(self, *, upto: int | None = None, retire: bool = True) -> int:
        """Upload the sealed segments: seal, sync, gather, replace the base, commit, retire."""
        seq = self.core.seal() if upto is None else upto
        with contextlib.suppress(CoreError):  # a sync that failed ends with this upload
            self.core.sync()
        with self.gather(seq) as gather:
            self.base = apply_gather(self.base, gather)
        self.committed_seq = max(self.committed_seq, seq)
        self.core.committed(seq)
        if retire:
            self.core.retire(seq)
        return seq

    def answers(self, fault: Fault) -> list[Install]:
        """What the base has for a fault. Zeros are told by page and chunk at once."""
        found: list[Install] = []
        base = self.base
        if fault.ticket:
            answer = self.windows(fault)
            told, err = (None, answer) if isinstance(answer, int) else (answer, 0)
            self.core.install_changed(fault.ticket, told, err)
            return []
        if fault.chunks:
            chunk = fault.block // GROUP
            told = [] if self.fault_errno else [hole_at(base, fault.block)]
            self.core.install_holes(fault.stamp, [*told, holes_error(chunk, self.fault_errno)])
            return []
        holes: dict[tuple[int, int], Holes] = {}
        for block in range(fault.block, fault.block + fault.count):
            if self.fault_errno:
                found.append(install_error(block, 1, self.fault_errno))
            elif block in base:
                try:
                    found.append(install_slot(block, self.rig.insert(base[block])))
                except CoreError:  # the cache's disk fails: given to who waits
                    key = blake3(base[block]).digest(16)
                    self.core.fill(fault.stamp, [Fill(block, key, key, base[block])])
            else:
                hole = hole_at(base, block)
                holes[hole.kind, hole.number] = hole
                found.append(install_retry(block, 1))
        self.core.install_holes(fault.stamp, list(holes.values()))
        return found


def hole_at(base: dict[int, bytes], block: int) -> Holes:
    """What a base says of the page of ``block``, or of its chunk if the base has that."""
    chunk = block // GROUP
    if any(at // GROUP == chunk for at in base):
        return holes_of_chunk(base, chunk)
    return holes_of_page(base, chunk // GROUP)


def holes_of_chunk(base: dict[int, bytes], chunk: int) -> Holes:
    """The blocks of a chunk that a base does not have."""
    return chunk_holes(chunk, _all_but(at % GROUP for at in base if at // GROUP == chunk))


def holes_of_page(base: dict[int, bytes], page: int) -> Holes:
    """The chunks of a page that a base does not have."""
    return page_holes(page, _all_but(at // GROUP % GROUP for at in base if at // GROUP // GROUP == page))


def _all_but(bits: Iterable[int]) -> int:
    return (1 << GROUP) - 1 - sum(1 << bit for bit in set(bits))


def apply_gather(base: dict[int, bytes], gather: Gather) -> dict[int, bytes]:
    """A new base: the old one with what the log holds."""
    new = dict(base)
    for extent in gather.extents():
        if extent.count > 4096:
            for block in [b for b in new if extent.block <= b < extent.block + extent.count]:
                del new[block]
            continue
        for block in range(extent.block, extent.block + extent.count):
            new.pop(block, None)
    for i, entry in enumerate(gather.entries()):
        data = bytearray(gather.nbytes(i, 1))
        gather.fill(i, 1, data)
        block = bytearray(new.get(entry.block, bytes(BLOCK)))
        overlay(block, entry.mask, entry.zero_mask, data)
        new[entry.block] = bytes(block)
    return new


class CoreRig:
    """One engine and its fault threads. ``hold()`` keeps faults unanswered for a while."""

    def __init__(self, tmp: Path, *, fault_threads: int = 2, **config: Any) -> None:
        self.tmp = tmp
        defaults: dict[str, Any] = {
            "cache_dir": tmp / "blocks",
            "workers": 2,
            "segment_bytes": 16 * SECTOR,
            "log_limit": 64 * MIB,
            "map_budget": 64 * MIB,
            "cache_bytes": 64 * BLOCK,
        }
        defaults.update(config)
        self.engine = Engine(EngineConfig(**defaults))
        self.cookies = itertools.count(1)
        self.names = itertools.count()
        self.vols: dict[int, Vol] = {}
        self.before_answer: Callable[[Vol, Fault], None] | None = None
        self.faults_seen: list[Fault] = []
        self._go = threading.Event()
        self._go.set()
        self._stop = False
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(fault_threads)]
        for thread in self._threads:
            thread.start()

    def vol(self, size: int = 64 * MIB, *, directory: Path | None = None, **config: Any) -> Vol:
        where = directory or self.tmp / f"log{next(self.names)}" / "id"
        return Vol(self, where, size, **config).open()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """No fault is answered inside."""
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()

    def insert(self, data: bytes) -> Any:
        digest = blake3(data).digest(16)
        while True:
            try:
                return self.engine.cache.insert(digest, digest, data)
            except CoreError as error:
                if not error.temporary:
                    raise

    def _serve(self) -> None:
        while not self._stop:
            try:
                fault = self.engine.faults_next(8, 20)
            except Closed:
                return
            if fault is None:
                continue
            while not self._go.wait(0.05):
                if self._stop:
                    return
            self.faults_seen.append(fault)
            vol = self.vols.get(fault.volume)
            if vol is None:
                continue
            if self.before_answer is not None:
                self.before_answer(vol, fault)
            with contextlib.suppress(Closed):
                try:
                    answers = vol.answers(fault)
                except CoreError:
                    if self._stop:
                        return
                    raise
                vol.core.install(fault.stamp, answers)

    def events(self, kind: int, deadline: float = 10.0) -> list[Any]:
        """Wait for events of ``kind``; others are thrown away."""
        until = time.monotonic() + deadline
        while time.monotonic() < until:
            found = [event for event in self.engine.events_next(50) if event.kind == kind]
            if found:
                return found
        raise AssertionError(f"no event of kind {kind}")

    def close(self) -> None:
        self._stop = True
        self._go.set()
        self.engine.shutdown()
        for vol in list(self.vols.values()):
            vol.close()
        for thread in self._threads:
            thread.join()
        self.engine.close()


class Background:
    """A call in a thread: ``result()`` gives what it returned or raises what it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self, deadline: float = 20.0) -> Any:
        self._thread.join(deadline)
        assert self.done, f"not done within {deadline} s"
        if self._error is not None:
            raise self._error
        return self._value
