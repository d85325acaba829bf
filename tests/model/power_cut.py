"""What a disk may hold after a power cut: a trace of the write log, replayed with a choice.

The trace (csrc/base/disk.h) says what was created, written, synced, renamed and unlinked, in order. Durable
at the cut is the data written before the beginning of a file's sync that has ended, and the directory
entries made before that of a directory's. Of the rest a cut keeps what it likes: any 4 KiB page as it was
after any of the writes to it, any entry, any unlink, with the file's size or without. What a sync that
failed covered is never durable, whatever a later one says (the kernel calls such pages clean), but for pages
that are written to once more.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PAGE = 4096
CREATE, WRITE, SYNC, SYNC_END, DIR, DIR_END, UNLINK, RENAME, SYNC_FAILED, DIR_FAILED = range(1, 11)
HEAD = struct.Struct("<BBHIQQ")


class Record(NamedTuple):
    kind: int
    path: str
    offset: int
    data: bytes
    at: int
    """Where the record ends in the trace."""


def read_trace(raw: bytes) -> list[Record]:
    records: list[Record] = []
    at = 0
    while at + HEAD.size <= len(raw):
        kind, _, name_length, _, offset, length = HEAD.unpack_from(raw, at)
        start = at + HEAD.size
        end = start + name_length + length
        if end > len(raw):
            break
        path = raw[start : start + name_length].decode()
        records.append(Record(kind, path, offset, raw[start + name_length : end], end))
        at = end
    return records


@dataclass
class Inode:
    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    mark: int = 0
    """Writes before the beginning of the sync under way."""
    lost: list[tuple[int, bytes]] = field(default_factory=list)
    """What a sync failed to write, page by page; older than ``pending``."""

    def synced(self) -> None:
        """The sync under way has ended. It wrote pages whole, so what was lost of them is there after all."""
        done = self.pending[: self.mark]
        pages = {page for write in done for page, _, _ in _by_page(write)}
        again = [write for write in self.lost if write[0] // PAGE in pages]
        self.lost = [write for write in self.lost if write[0] // PAGE not in pages]
        self.durable = _written(self.durable, again + done)
        del self.pending[: self.mark]
        self.mark = 0

    def failed(self) -> None:
        """It has failed."""
        for write in self.pending[: self.mark]:
            self.lost += [(start, piece) for _, start, piece in _by_page(write)]
        del self.pending[: self.mark]
        self.mark = 0

    def content(self) -> bytes:
        """The file as processes see it."""
        return _written(self.durable, self.lost + self.pending)


class Keep(NamedTuple):
    """How a cut chooses: probabilities that an unsynced page, entry or file size survives."""

    page: float
    entry: float
    size: float


NOTHING = Keep(0.0, 0.0, 0.0)
EVERYTHING = Keep(1.0, 1.0, 1.0)
KEEPS = {
    "nothing": NOTHING,
    "everything": EVERYTHING,
    "entries only": Keep(0.0, 1.0, 1.0),
    "pages only": Keep(1.0, 0.0, 1.0),
    "half": Keep(0.5, 0.5, 0.5),
    "most": Keep(0.85, 0.9, 0.9),
    "few": Keep(0.2, 0.9, 0.9),
}


class Disk:
    """One directory, as the kernel has it and as the platter has it."""

    def __init__(self, directory: str, files: dict[str, bytes]) -> None:
        self.directory = directory
        self.entries = {name: Inode(data) for name, data in files.items()}
        self.durable = dict(self.entries)
        self.changes: list[tuple[int, str, str, Inode]] = []
        self.dir_mark = 0

    def apply(self, record: Record) -> None:
        parent, _, name = record.path.rpartition("/")
        if record.path == self.directory and record.kind == DIR:
            self.dir_mark = len(self.changes)
        elif record.path == self.directory and record.kind == DIR_END:
            for change in self.changes[: self.dir_mark]:
                _change(self.durable, change)
            del self.changes[: self.dir_mark]
            self.dir_mark = 0
        elif record.path == self.directory and record.kind == DIR_FAILED:
            self.dir_mark = 0
        elif parent != self.directory:
            return
        elif record.kind == CREATE:
            self._enter(record.kind, name, name, Inode())
        elif record.kind == RENAME:
            self._enter(record.kind, name, record.data.decode().rpartition("/")[2], self.entries[name])
        elif record.kind == UNLINK:
            if name in self.entries:
                self._enter(record.kind, name, name, self.entries[name])
        elif record.kind == WRITE:
            self.entries[name].pending.append((record.offset, record.data))
        elif record.kind == SYNC and name in self.entries:
            inode = self.entries[name]
            inode.mark = len(inode.pending)
        elif record.kind == SYNC_END and name in self.entries:
            self.entries[name].synced()
        elif record.kind == SYNC_FAILED and name in self.entries:
            self.entries[name].failed()

    def _enter(self, kind: int, name: str, to: str, inode: Inode) -> None:
        change = (kind, name, to, inode)
        _change(self.entries, change)
        self.changes.append(change)

    def names(self) -> set[str]:
        """Of all files that are there, or may be."""
        return set(self.entries) | set(self.durable) | {to for _, _, to, _ in self.changes}

    def now(self) -> dict[str, bytes]:
        """The files as processes see them."""
        return {name: inode.content() for name, inode in self.entries.items()}

    def cut(self, keep: Keep, rng: random.Random) -> dict[str, bytes]:
        """The files that are there when the power is back."""
        entries = dict(self.durable)
        for change in self.changes:
            if rng.random() < keep.entry:
                _change(entries, change)
        return {name: _torn(inode, keep, rng) for name, inode in entries.items()}


def _by_page(write: tuple[int, bytes]) -> Iterator[tuple[int, int, bytes]]:
    """(page, offset, bytes) of each page that a write touches."""
    offset, piece = write
    for page in range(offset // PAGE, (offset + len(piece) - 1) // PAGE + 1):
        start, end = max(offset, page * PAGE), min(offset + len(piece), (page + 1) * PAGE)
        yield page, start, piece[start - offset : end - offset]


def _change(entries: dict[str, Inode], change: tuple[int, str, str, Inode]) -> None:
    kind, name, to, inode = change
    if kind == CREATE:
        entries[name] = inode
    elif entries.get(name) is inode:
        del entries[name]
        if kind == RENAME:
            entries[to] = inode


def _written(data: bytes, writes: list[tuple[int, bytes]]) -> bytes:
    out = bytearray(data)
    for offset, piece in writes:
        if len(out) < offset + len(piece):
            out.extend(bytes(offset + len(piece) - len(out)))
        out[offset : offset + len(piece)] = piece
    return bytes(out)


def _torn(inode: Inode, keep: Keep, rng: random.Random) -> bytes:
    """Each page as it was after some of the writes to it."""
    unsynced = inode.lost + inode.pending
    if not unsynced:
        return inode.durable
    full = inode.content()
    out = bytearray(inode.durable)
    size = len(full) if rng.random() < keep.size else max(len(out), rng.randrange(len(full) + 1))
    out.extend(bytes(len(full) - len(out)))
    pages: dict[int, list[tuple[int, bytes]]] = {}
    for write in unsynced:
        for page, start, piece in _by_page(write):
            pages.setdefault(page, []).append((start, piece))
    for writes in pages.values():
        if rng.random() < keep.page:
            count = len(writes) if rng.random() < 0.6 else rng.randrange(len(writes) + 1)
            for start, piece in writes[:count]:
                out[start : start + len(piece)] = piece
    return bytes(out[:size])


def cut_power(
    directory: Path,
    files: dict[str, bytes],
    records: list[Record],
    at: int,
    keep: Keep,
    rng: random.Random,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, bytes]:
    """Replace the log directory by what a cut after byte ``at`` of the trace leaves of it.

    ``files`` is what it held, durably, when the trace began; the witness file beside the directory is one of
    them, as ``../{name}``. Returns what it holds now.
    """
    witness = f"{directory.name}.witness"
    around = Disk(
        str(directory.parent), {witness: files[f"../{witness}"]} if f"../{witness}" in files else {}
    )
    disk = Disk(str(directory), {name: data for name, data in files.items() if "/" not in name})
    for record in records:
        if record.at > at:
            break
        disk.apply(record)
        around.apply(record)
    left = disk.cut(keep, rng)
    left |= {f"../{name}": data for name, data in around.cut(keep, rng).items() if name == witness}
    for path in directory.glob("*") if directory.is_dir() else ():
        path.unlink()
    (directory.parent / witness).unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in left.items():
        (directory / name).write_bytes(data)
    note(f"power cut at {at}: { ({name: len(data) for name, data in left.items()}) }")
    return left
