"""Read a volume, snapshot, tag or base out of a store into a raw image file, without a daemon.

It is the answer to "how do I get my data if the rest fails": formats and store only, nothing of the
engine. Every payload is verified. The image is sparse, memory is bounded by a few windows, and the
file gets its name only when it is complete.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from glidefs import names
from glidefs.errors import ConfigError, CorruptObject, UnknownExport
from glidefs.errors import NotFound as ObjectNotFound
from glidefs.formats.manifest import EMPTY_PAGE, PAGE_CHUNKS, PackRef, Page, Root, decode_page, decode_root
from glidefs.formats.pack import (
    BLOCK,
    CHUNK_BLOCKS,
    FULL_MASK,
    SECTOR,
    Buffer,
    PackEntry,
    PackIndex,
    decode_index,
    decode_payload,
)
from glidefs.store.base import ObjectStore

WINDOW_BLOCKS = 64
"""Blocks that one worker puts together at a time."""
WORKERS = 4
INDEX_BUDGET = 64 << 20
"""Bytes of pack indices kept."""
MAX_GAP = 64 << 10
"""Unwanted bytes between two payloads that one request may read."""
MAX_READ = 16 << 20

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, of the windows that hold data."""


class ExportResult(NamedTuple):
    """What was written: the image's ``size``, and the ``data_bytes`` of it that are not holes.

    ``removed_at`` (unix seconds) is not 0 for a removed base, which can be read until gc deletes it.
    """

    name: str
    key: str
    size: int
    data_bytes: int
    sequence: int
    removed_at: int = 0


class _Piece(NamedTuple):
    """One payload that a window needs."""

    ref: PackRef
    entry: PackEntry


def export_image(
    store: ObjectStore,
    prefix: str,
    source: str,
    target: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write the image of `source` to the file `target`.

    Raises UnknownExport where the store has no such thing, CorruptObject where an object fails its
    checksum, ConfigError for a target that cannot be written, StoreError.
    """
    key = names.parse_source(source).key(prefix)
    try:
        root = decode_root(key, store.get(key).data)
    except ObjectNotFound:
        raise UnknownExport(source, f"the store has no {key}; check the name, --prefix and --store") from None
    partial = target.with_name(f".{target.name}.partial")
    _check_target(target, force)
    try:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{target}: {error.strerror}") from error
    try:
        try:
            os.ftruncate(fd, root.size)
            data_bytes = _Exporter(store, prefix, key, root, fd, progress).run()
            os.fsync(fd)
        except OSError as error:
            raise ConfigError(f"{target}: {error.strerror}; the image needs that much free space") from error
        finally:
            os.close(fd)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return ExportResult(root.name, key, root.size, data_bytes, root.sequence, root.removed_at)


def _check_target(target: Path, force: bool) -> None:
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{target}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{target} is not a regular file; export to a file and copy from there")
    if not force:
        raise ConfigError(f"{target} exists; --force replaces it")


class _Exporter:
    """The state of one run. `_indices` is guarded by `_lock`; everything else is read-only."""

    def __init__(
        self, store: ObjectStore, prefix: str, key: str, root: Root, fd: int, progress: Progress | None
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._key = key
        self._root = root
        self._fd = fd
        self._progress = progress
        self._indices: OrderedDict[bytes, PackIndex] = OrderedDict()
        self._index_bytes = 0
        self._lock = threading.Lock()

    def run(self) -> int:
        """Copy everything; returns the data bytes written."""
        total = (
            sum(len(page.chunks) for _, page in self._pages()) * CHUNK_BLOCKS * BLOCK if self._progress else 0
        )
        done = written = 0
        pending: list[Future[int]] = []
        with ThreadPoolExecutor(WORKERS, "export") as pool:
            try:
                for first, refs in self._windows():
                    pending.append(pool.submit(self._copy, first, refs))
                    if len(pending) > WORKERS:
                        written += pending.pop(0).result()
                        done += WINDOW_BLOCKS * BLOCK
                        if self._progress:
                            self._progress(min(done, total), total)
                for future in pending:
                    written += future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if self._progress:
            self._progress(total, total)
        return written

    def _pages(self) -> Iterator[tuple[int, Page]]:
        if self._root.inline_page is not None:
            yield 0, self._root.inline_page
            return
        for number, page_id in enumerate(self._root.page_ids):
            if page_id:
                key = names.page_key(self._prefix, page_id.hex())
                yield number, decode_page(key, self._store.get(key).data)
            else:
                yield number, EMPTY_PAGE

    def _windows(self) -> Iterator[tuple[int, list[PackRef]]]:
        """First block of each window, and the packs that may have data in it, oldest first."""
        end = -(-self._root.size // BLOCK)
        for number, page in self._pages():
            for chunk in sorted(page.chunks):
                refs = [page.packs[index] for index in page.chunks[chunk]]
                first = (number * PAGE_CHUNKS + chunk) * CHUNK_BLOCKS
                for block in range(first, min(first + CHUNK_BLOCKS, end), WINDOW_BLOCKS):
                    yield block, refs

    def _index(self, ref: PackRef) -> PackIndex:
        with self._lock:
            if ref.id in self._indices:
                self._indices.move_to_end(ref.id)
                return self._indices[ref.id]
        key = names.pack_key(self._prefix, ref.id.hex())
        tail, size = self._store.get_suffix(key, ref.index_length)
        if size != ref.size:
            raise CorruptObject(key, size, f"the pack has {size} bytes, the manifest says {ref.size}")
        index = decode_index(key, tail, size)
        with self._lock:
            if ref.id not in self._indices:
                self._indices[ref.id] = index
                self._index_bytes += index.nbytes
            while self._index_bytes > INDEX_BUDGET and len(self._indices) > 1:
                self._index_bytes -= self._indices.popitem(last=False)[1].nbytes
        return index

    def _copy(self, first: int, refs: list[PackRef]) -> int:
        """Put one window together and write what is not zero of it."""
        layers: dict[int, list[_Piece]] = {}
        covered: dict[int, int] = {}
        for ref in reversed(refs):
            for entry in self._index(ref).range(first, WINDOW_BLOCKS):
                seen = covered.get(entry.block, 0)
                if (entry.mask | entry.zero_mask) & ~seen:
                    layers.setdefault(entry.block, []).append(_Piece(ref, entry))
                    covered[entry.block] = seen | entry.mask | entry.zero_mask
        if not layers:
            return 0
        window = bytearray(WINDOW_BLOCKS * BLOCK)
        payloads = self._fetch([piece for pieces in layers.values() for piece in pieces if piece.entry.mask])
        for block, pieces in layers.items():
            at = (block - first) * BLOCK
            for piece in reversed(pieces):
                overlay(window, at, piece.entry, payloads.get((piece.ref.id, block), b""))
        return self._write(first * BLOCK, window)

    def _fetch(self, pieces: list[_Piece]) -> dict[tuple[bytes, int], Buffer]:
        """Read and verify payloads, neighbours in one pack with one request."""
        payloads: dict[tuple[bytes, int], Buffer] = {}
        pieces.sort(key=lambda piece: (piece.ref.id, piece.entry.offset))
        for run in _runs(pieces):
            key = names.pack_key(self._prefix, run[0].ref.id.hex())
            start = run[0].entry.offset
            length = max(piece.entry.offset + piece.entry.stored for piece in run) - start
            data = memoryview(self._store.get_range(key, start, length))
            for piece in run:
                at = piece.entry.offset - start
                stored = data[at : at + piece.entry.stored]
                payloads[piece.ref.id, piece.entry.block] = decode_payload(key, piece.entry, stored)
        return payloads

    def _write(self, offset: int, window: bytearray) -> int:
        """Write the runs of blocks that are not all zeros; a hole stays a hole."""
        view = memoryview(window)[: self._root.size - offset]
        zero = bytes(BLOCK)
        written = at = 0
        while at < len(view):
            end = at
            while end < len(view) and view[end : end + BLOCK] != zero[: len(view) - end]:
                end = min(end + BLOCK, len(view))
            while at < end:
                count = os.pwrite(self._fd, view[at:end], offset + at)
                at += count
                written += count
            at += BLOCK
        return written


def overlay(window: bytearray, at: int, entry: PackEntry, payload: Buffer) -> None:
    """Lay the sectors of `entry` over the block at `at`, its zero sectors too."""
    if entry.mask == FULL_MASK:
        window[at : at + BLOCK] = payload
        return
    taken = 0
    for sector in range(BLOCK // SECTOR):
        where = slice(at + sector * SECTOR, at + (sector + 1) * SECTOR)
        if entry.mask >> sector & 1:
            window[where] = payload[taken : taken + SECTOR]
            taken += SECTOR
        elif entry.zero_mask >> sector & 1:
            window[where] = bytes(SECTOR)


def _runs(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Split sorted pieces where the pack changes, the gap is wide or the request would be long."""
    run: list[_Piece] = []
    for piece in pieces:
        if run:
            last, entry = run[-1], piece.entry
            gap = entry.offset - (last.entry.offset + last.entry.stored)
            long = entry.offset + entry.stored - run[0].entry.offset > MAX_READ
            if piece.ref.id != last.ref.id or gap > MAX_GAP or long:
                yield run
                run = []
        run.append(piece)
    if run:
        yield run
