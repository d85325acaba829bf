"""The local disks of a simulation: what the kernel and the platters have, and how they fail.

Two sources say what reaches a disk: the trace of the core (csrc/base/disk.h), and ``Files``, which stands in
for the module ``os`` where the product writes small files that must last. Both become records in one order,
and each directory that they touch is a ``Disk`` of tests/model/power_cut.py.
"""

from __future__ import annotations

import copy
import errno
import os
import random
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core_rig import inject, inject_nothing, trace
from power_cut import (
    CREATE,
    DIR,
    DIR_END,
    DIR_FAILED,
    RENAME,
    SYNC,
    SYNC_END,
    SYNC_FAILED,
    UNLINK,
    WRITE,
    Disk,
    Keep,
    Record,
    read_trace,
)

ENDS = (SYNC_END, DIR_END, SYNC_FAILED, DIR_FAILED)
FOR_EVER = 1 << 30
RESURRECTED = 0.5
"""How often a power cut brings a directory back that was deleted."""


class Platter:
    """Every directory of a write log, and of small files, of all nodes.

    The trace is the process's: what an engine of another test does meanwhile is in it, and left out.
    """

    def __init__(self, home: Path) -> None:
        """``home`` is above the directories of all nodes."""
        trace_path = home / "trace"
        self._below = f"{home}/"
        self.disks: dict[str, Disk] = {}
        self._records: list[Record] = []
        self._parsed = 0
        trace(trace_path)
        self._trace = os.open(trace_path, os.O_RDONLY)

    def close(self) -> None:
        trace(None)
        os.close(self._trace)

    def is_ours(self, path: str) -> bool:
        """Whether it is a path of the simulation."""
        return path.startswith(self._below)

    def position(self) -> int:
        """Where the core's trace ends now: what spans of the history are made of."""
        return os.fstat(self._trace).st_size

    def record(self, kind: int, path: str, offset: int = 0, data: bytes = b"") -> None:
        """Something that Python did to a file."""
        self._read()
        self._records.append(Record(kind, path, offset, data, self.position()))

    def _read(self) -> None:
        raw = os.pread(self._trace, self.position() - self._parsed, self._parsed)
        new = [record._replace(at=record.at + self._parsed) for record in read_trace(raw)]
        if new:
            self._parsed = new[-1].at  # what follows is half of a record of others, whose rest comes yet
            self._records += _in_order([record for record in new if self.is_ours(record.path)])

    # -- steps ---------------------------------------------------------------------------------------

    def settle(self) -> None:
        """All that was recorded has happened."""
        self._read()
        self._apply(len(self._records))

    def steps(self) -> list[int]:
        """Positions of what was recorded since it was settled: where an operation may be cut."""
        self._read()
        return [record.at for record in self._records]

    def _apply(self, count: int) -> None:
        for record in self._records[:count]:
            self._disk(record).apply(record)
        del self._records[:count]

    def _disk(self, record: Record) -> Disk:
        directory = record.path if record.kind in (DIR, DIR_END, DIR_FAILED) else os.path.dirname(record.path)
        disk = self.disks.get(directory)
        if disk is None:
            disk = self.disks[directory] = Disk(directory, {})
        return disk

    # -- the end of a process, and of the power ------------------------------------------------------

    def forget_after(self, at: int, home: Path) -> None:
        """What was recorded behind position ``at`` did not happen; files are made to say so."""
        self._read()
        kept = sum(1 for record in self._records if record.at <= at)
        undone: dict[str, set[str]] = {}
        for record in self._records[kept:]:
            names = undone.setdefault(self._disk(record).directory, set())
            names |= {os.path.basename(record.path)}
            names |= {os.path.basename(record.data.decode())} if record.kind == RENAME else set()
        self._apply(kept)
        self._records.clear()
        for directory, names in sorted(undone.items()):
            if Path(directory).is_relative_to(home) and os.path.isdir(directory):
                _put_files(Path(directory), names, self.disks[directory].now())

    def cut(self, home: Path, keep: Keep, rng: random.Random) -> None:
        """The power of a node is cut; its files become what the platter has."""
        assert not self._records
        for directory in sorted(self.disks):
            path = Path(directory)
            if not path.is_relative_to(home):
                continue
            disk = self.disks[directory]
            if not path.is_dir():
                if rng.random() >= RESURRECTED:
                    del self.disks[directory]
                    continue
                path.mkdir(parents=True)
            left = disk.cut(keep, rng)
            _put_files(path, disk.names(), left)
            self.disks[directory] = Disk(directory, left)

    def clone(self, home: Path, to: Path) -> None:
        """What the platter has of a node, and what it has not yet, for a copy of its disk."""
        self.settle()
        for directory in [one for one in self.disks if Path(one).is_relative_to(home)]:
            disk = copy.deepcopy(self.disks[directory])
            disk.directory = str(to / Path(directory).relative_to(home))
            self.disks[disk.directory] = disk

    def lose(self, home: Path) -> None:
        """A node's disk is gone."""
        for directory in [one for one in self.disks if Path(one).is_relative_to(home)]:
            del self.disks[directory]


def _in_order(records: list[Record]) -> list[Record]:
    """Syncs that run side by side end in any order; take one that does not depend on the kernel."""
    out: list[Record] = []
    start = 0
    for i, record in enumerate([*records, None]):
        if record is not None and record.kind in ENDS:
            continue
        run = records[start:i]
        ends = [one.at for one in run]
        out += [one._replace(at=at) for one, at in zip(sorted(run, key=_by_path), ends, strict=True)]
        out += [record] if record is not None else []
        start = i + 1
    return out


def _by_path(record: Record) -> tuple[int, str]:
    return record.kind, record.path


def _put_files(directory: Path, known: set[str], files: dict[str, bytes]) -> None:
    """Replace what is ``known`` of a directory; files that nobody recorded stay."""
    for name in known - set(files):
        if not (directory / name).is_dir():
            (directory / name).unlink(missing_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)


class Files:
    """Stands in for ``os`` in the modules that write records, local roots and pages.

    ``before(operation, path)`` is called before each; what it raises is what happens instead. Files of others
    are opened, written and closed as ever.
    """

    def __init__(self, platter: Platter, before: Callable[[str, str], None]) -> None:
        self._platter = platter
        self._before = lambda operation, path: before(operation, path) if platter.is_ours(path) else None
        self._files: dict[int, tuple[str, int]] = {}

    def _record(self, kind: int, path: str, offset: int = 0, data: bytes = b"") -> None:
        if self._platter.is_ours(path):
            self._platter.record(kind, path, offset, data)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        name = os.fspath(path)
        if flags & os.O_CREAT:
            self._before("create", name)
        fd = os.open(path, flags, mode)
        self._files[fd] = (name, 0)
        if flags & os.O_CREAT:
            self._record(CREATE, name)
        return fd

    def write(self, fd: int, data: Any) -> int:
        name, offset = self._files.get(fd, ("", 0))
        self._before("write", name)
        done = os.write(fd, data)
        self._record(WRITE, name, offset, bytes(data[:done]))
        self._files[fd] = (name, offset + done)
        return done

    def fsync(self, fd: int) -> None:
        name, _ = self._files.get(fd, ("", 0))
        begin = DIR if stat.S_ISDIR(os.fstat(fd).st_mode) else SYNC
        self._before("fsync", name)
        self._record(begin, name)
        self._record(begin + 1, name)

    def close(self, fd: int) -> None:
        self._files.pop(fd, None)
        os.close(fd)

    def rename(self, old: Any, new: Any) -> None:
        self._before("rename", os.fspath(new))
        os.rename(old, new)
        self._record(RENAME, os.fspath(old), 0, os.fsencode(new))

    def unlink(self, path: Any) -> None:
        self._before("unlink", os.fspath(path))
        os.unlink(path)
        self._record(UNLINK, os.fspath(path))

    def getpid(self) -> int:
        """For names of files that are the same in every run."""
        return 1

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class DiskFaults:
    """Errors of the local disks, one kind at a time. ``counts`` are those that were armed or raised."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._small: dict[str, int] = {}
        self.log_is_stuck = False
        """Whether no write to a log works."""

    def stop_writes(self, err: int) -> None:
        """From now on no write log can be written to: the disk is full (ENOSPC), or fails (EIO)."""
        inject(WRITE, err, count=FOR_EVER)
        inject(CREATE, err, count=FOR_EVER)
        self.log_is_stuck = True
        self.counts[f"log write {errno.errorcode[err]}"] += 1

    def fail_syncs(self, kind: int) -> None:
        """From now on syncs of log segments (SYNC) or of their directories (DIR) fail."""
        inject(kind, errno.EIO, count=FOR_EVER)
        self.counts["log fsync EIO" if kind == SYNC else "log directory fsync EIO"] += 1

    def fail_small(self, operation: str, err: int) -> None:
        """From now on ``operation`` on small files fails."""
        self._small[operation] = err

    @property
    def small_fail(self) -> bool:
        """Whether something fails on small files now."""
        return bool(self._small)

    def check_small(self, operation: str, path: str) -> None:
        """Raise what ``operation`` on this file is to meet."""
        err = self._small.get(operation)
        if err is not None:
            self.counts[f"file {operation} {errno.errorcode[err]}"] += 1
            raise OSError(err, os.strerror(err), path)

    def stop(self) -> None:
        """All is well again."""
        inject_nothing()
        self._small.clear()
        self.log_is_stuck = False
