"""Read a volume, snapshot, tag or base out of a store into a raw image file, without a daemon.

It is the answer to "how do I get my data if the rest fails": formats and store only, nothing of the
engine (see offline.py). The image is sparse, memory is bounded by a few windows, and the file gets its
name only when it is complete.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from glidefs import names
from glidefs.errors import ConfigError, UnknownExport
from glidefs.errors import NotFound as ObjectNotFound
from glidefs.formats.manifest import PAGE_CHUNKS, PackRef, Page, Root, decode_root
from glidefs.formats.pack import BLOCK, CHUNK_BLOCKS
from glidefs.offline.reader import BlockReader
from glidefs.store.base import ObjectStore
from glidefs.store.checked import get_checked

WINDOW_BLOCKS = 64
"""Blocks that one worker puts together at a time."""
WORKERS = 4

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
        root, _ = get_checked(store, key, decode_root)
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
            data_bytes = _Exporter(BlockReader(store, prefix, root), root, fd, progress).run()
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
    """The state of one run; all of it is read-only."""

    def __init__(self, reader: BlockReader, root: Root, fd: int, progress: Progress | None) -> None:
        self._reader = reader
        self._root = root
        self._fd = fd
        self._progress = progress

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
        for number in range(self._reader.page_count):
            yield number, self._reader.page(number)

    def _windows(self) -> Iterator[tuple[int, list[PackRef]]]:
        """First block of each window, and the packs that may have data in it, oldest first."""
        end = -(-self._root.size // BLOCK)
        for number, page in self._pages():
            for chunk in sorted(page.chunks):
                refs = [page.packs[index] for index in page.chunks[chunk]]
                first = (number * PAGE_CHUNKS + chunk) * CHUNK_BLOCKS
                for block in range(first, min(first + CHUNK_BLOCKS, end), WINDOW_BLOCKS):
                    yield block, refs

    def _copy(self, first: int, refs: list[PackRef]) -> int:
        """Put one window together and write what is not zero of it."""
        window = self._reader.window(first, WINDOW_BLOCKS, refs)
        return 0 if window is None else self._write(first * BLOCK, window)

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
