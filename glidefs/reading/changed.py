"""What may have changed since a snapshot, by the manifests alone: for the NBD contexts ``glidefs:changed:``.

The rule, with the core's part of it in ``csrc/volume/changed.h``: a sector that differs from the snapshot is
never said to be unchanged. Two manifests are compared here, the one in use and the snapshot's. Pages with one
id and chunks of the same packs are equal, and are not looked at. In other chunks a sector is unchanged where
both manifests take it from equal payloads, or have zeros there; no data is read. The log, and what it has
beyond the manifest in use, is the core's.

It is exact to 4 KiB, with one exception. Compaction makes one payload of several that a block of 128 KiB had
parts in. The hash of the new one says nothing of the old ones, so all sectors of that payload count as
changed. A block that had one payload keeps it, and its hash, through a compaction.

Beyond the end of the smaller of the two there are zeros. What was written with the same bytes may count as
changed.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Executor
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from glidefs.core.engine import Fault
from glidefs.core.volume import MAX_SNAPSHOT, Changed
from glidefs.errors import CorruptObject, NotFound
from glidefs.formats.manifest import PAGE_CHUNKS, PackRef, Page, Root, decode_root, page_count
from glidefs.formats.pack import CHUNK_BLOCKS, FULL_MASK, SECTORS_PER_BLOCK, PackIndex
from glidefs.manifest.view import Manifest
from glidefs.names import parse_source, snapshot_key, snapshot_sequence, snapshots_prefix
from glidefs.reading.reader import load_indices
from glidefs.store.base import ObjectStore
from glidefs.store.checked import get_checked

if TYPE_CHECKING:
    from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

MAX_EDGES = 4096
"""Of one answer, beyond its first block: 32 KiB in the core, as long as a connection keeps it."""
MAX_CHUNKS = 256
"""Chunks whose packs are compared for one answer: a guest's read may wait for the same thread."""
MAX_LISTED = 256
"""Snapshots of a volume that clients are told of, the newest ones."""
LISTING = 5.0
"""Seconds in which they are looked at: so many of the newest as it takes. A handshake waits for that."""

CHUNK_SECTORS = CHUNK_BLOCKS * SECTORS_PER_BLOCK
PAGE_SECTORS = PAGE_CHUNKS * CHUNK_SECTORS
_LOG_EVERY = 10.0

Part = tuple[int, bool]
"""Sectors up to this one (exclusive), from where the part before ended: whether they may have changed."""


# -- snapshots of a volume ---------------------------------------------------------------------------


def stored_sequences(store: ObjectStore, prefix: str, name: str) -> list[int]:
    """The snapshots under the name of a volume, ascending. Raises StoreError."""
    found = (snapshot_sequence(info.key) for info in store.list(snapshots_prefix(prefix, name)))
    return sorted(sequence for sequence in found if sequence is not None)


class _Origin(NamedTuple):
    """A volume by its name and its id (16 bytes)."""

    name: str
    id: bytes


def _stored(volume: Volume, store: ObjectStore, name: str, sequence: int) -> Root | None:
    try:
        return get_checked(store, snapshot_key(volume.prefix, name, sequence), decode_root)[0]
    except NotFound:
        return None


def _origin(volume: Volume, store: ObjectStore) -> _Origin | None:
    """Whose snapshots are meant: the volume's own, or those of the volume that a view shows a snapshot of."""
    root, record = volume.root, volume.record
    if not record.is_view:
        return _Origin(root.name, root.volume_id)
    source = parse_source(record.source)
    if source.kind != "snapshot":
        return None
    shown = _stored(volume, store, source.name, source.sequence)
    if shown is None or (shown.page_ids, shown.inline_page) != (root.page_ids, root.inline_page):
        return None  # deleted, and what is there by now is another volume's
    return _Origin(source.name, shown.volume_id)


def _snapshot(volume: Volume, store: ObjectStore, origin: _Origin, sequence: int) -> Root | None:
    found = _stored(volume, store, origin.name, sequence)
    return found if found is not None and found.volume_id == origin.id else None


def snapshot_of(volume: Volume, store: ObjectStore, sequence: int) -> Root | None:
    """The root of a snapshot of this volume; None if there is none, or one of an earlier volume of its name.

    Raises CorruptObject, StoreError.
    """
    origin = _origin(volume, store)
    return None if origin is None else _snapshot(volume, store, origin, sequence)


def snapshots_of(volume: Volume, store: ObjectStore) -> list[int]:
    """The newest snapshots of this volume, ascending. Raises CorruptObject, StoreError.

    Those of the volume that it was forked from are not among them. A view of a snapshot has all of the
    snapshot's volume.
    """
    origin = _origin(volume, store)
    if origin is None:
        return []
    stored = stored_sequences(store, volume.prefix, origin.name)
    newest = [sequence for sequence in stored if sequence <= MAX_SNAPSHOT][: -MAX_LISTED - 1 : -1]
    found, until = [], time.monotonic() + LISTING
    for sequence in newest:
        if time.monotonic() > until:
            break
        if _snapshot(volume, store, origin, sequence) is not None:
            found.append(sequence)
    return found[::-1]


class VolumeSnapshots(msgspec.Struct, frozen=True):
    """The snapshots of a volume, for a transport. Methods raise CorruptObject, StoreError."""

    volume: Volume
    store: ObjectStore

    def listed(self) -> Sequence[int]:
        """See :func:`snapshots_of`."""
        return snapshots_of(self.volume, self.store)

    def has(self, sequence: int) -> bool:
        """Whether there is one."""
        return sequence <= MAX_SNAPSHOT and snapshot_of(self.volume, self.store, sequence) is not None


# -- answers -----------------------------------------------------------------------------------------


class Changes:
    """Answers the questions of the core. Thread-safe; ``helpers`` load pack indices."""

    def __init__(self, helpers: Executor | None) -> None:
        self._helpers = helpers
        self._last_loud = -_LOG_EVERY

    def answer(self, volume: Volume, store: ObjectStore, fault: Fault) -> None:
        """Say what may have changed from the fault's block on. Raises StoreError, Closed.

        Requests fail with ENOENT where the snapshot was deleted, with EIO where a manifest or an index is
        damaged.
        """
        now = volume.manifest(store)
        try:
            root = snapshot_of(volume, store, fault.snapshot)
            if root is None:
                volume.core.install_changed(fault.ticket, None, errno.ENOENT)
                return
            then = now.beside(root)
            answer = compare(now, then, fault.block, self._helpers)
        except (CorruptObject, NotFound) as error:
            # gc may have deleted what a snapshot named that was deleted meanwhile.
            gone = isinstance(error, NotFound) and snapshot_of(volume, store, fault.snapshot) is None
            if not gone:
                self._say(volume, fault.snapshot, error)
            volume.core.install_changed(fault.ticket, None, errno.ENOENT if gone else errno.EIO)
            return
        volume.core.install_changed(fault.ticket, answer)

    def _say(self, volume: Volume, sequence: int, error: Exception) -> None:
        now = time.monotonic()
        if now - self._last_loud >= _LOG_EVERY:
            self._last_loud = now
            log.error(
                "volume %s: what changed since snapshot %d cannot be told: %s", volume.name, sequence, error
            )


def compare(now: Manifest, then: Manifest, block: int, helpers: Executor | None = None) -> Changed:
    """What may differ between two manifests of a volume from ``block`` on, as far as one answer goes.

    Raises CorruptObject, NotFound, StoreError.
    """
    first = block * SECTORS_PER_BLOCK
    end, changed, edges = first, False, list[int]()
    for stop, differs in _parts(now, then, block, helpers):
        if stop <= end:
            continue
        if end == first:
            changed = differs
        elif differs != changed ^ bool(len(edges) % 2):
            # All of the block in any case: a request may begin anywhere in it.
            if len(edges) >= MAX_EDGES and end >= first + SECTORS_PER_BLOCK:
                break
            edges.append(end)
        end = stop
    return Changed(first, end, changed, edges, now.root.last_segment)


def _parts(now: Manifest, then: Manifest, block: int, helpers: Executor | None) -> Iterator[Part]:
    """Parts from ``block`` on, ascending, to the end of the last page or of what one answer compares."""
    compared = 0
    first_page = block // CHUNK_BLOCKS // PAGE_CHUNKS
    for number in range(first_page, max(page_count(now.root.size), first_page + 1)):
        if not _is_same_page(now.root, then.root, number):
            for pair in _different_chunks(now.page(number), then.page(number)):
                chunk = number * PAGE_CHUNKS + pair.chunk
                if (chunk + 1) * CHUNK_BLOCKS <= block:
                    continue
                start = chunk * CHUNK_SECTORS
                yield start, False
                if compared == MAX_CHUNKS:
                    return
                compared += 1
                yield from _chunk_parts(now, then, pair, chunk, helpers)
        yield (number + 1) * PAGE_SECTORS, False


def _is_same_page(now: Root, then: Root, number: int) -> bool:
    """Whether a page is known to be equal by its id alone."""
    if now.inline_page is not None or then.inline_page is not None:
        return now.inline_page == then.inline_page
    ids = [root.page_ids[number] if number < len(root.page_ids) else b"" for root in (now, then)]
    return ids[0] == ids[1]


class _Pair(NamedTuple):
    """A chunk (its number within the page) with its packs, oldest first, in two manifests."""

    chunk: int
    now: tuple[PackRef, ...]
    then: tuple[PackRef, ...]


def _different_chunks(now: Page, then: Page) -> Iterator[_Pair]:
    for chunk in sorted(now.chunks.keys() | then.chunks.keys()):
        pair = _Pair(
            chunk,
            tuple(now.packs[i] for i in now.chunks.get(chunk, ())),
            tuple(then.packs[i] for i in then.chunks.get(chunk, ())),
        )
        if pair.now != pair.then:
            yield pair


def _chunk_parts(
    now: Manifest, then: Manifest, pair: _Pair, chunk: int, helpers: Executor | None
) -> Iterator[Part]:
    first = chunk * CHUNK_BLOCKS
    masks = _changed_masks(now, then, pair, first, helpers)
    for block in sorted(masks):
        at = block * SECTORS_PER_BLOCK
        for start, stop in bit_runs(masks[block]):
            yield at + start, False
            yield at + stop, True
    yield (first + CHUNK_BLOCKS) * SECTORS_PER_BLOCK, False


def _changed_masks(
    now: Manifest, then: Manifest, pair: _Pair, first: int, helpers: Executor | None
) -> dict[int, int]:
    """The sectors of each block of a chunk, from block ``first`` on, that may differ, as a mask."""
    shared = 0
    while shared < min(len(pair.now), len(pair.then)) and pair.now[shared] == pair.then[shared]:
        shared += 1
    masks: dict[int, int] = {}
    for index in load_indices(now, pair.now[shared:], helpers):
        for block, mask, zero_mask in index.masks(first, CHUNK_BLOCKS):
            masks[block] = masks.get(block, 0) | mask | zero_mask
    if len(pair.then) == shared:
        return masks  # packs were added, and nothing else
    for index in load_indices(then, pair.then[shared:], helpers):
        for block, mask, zero_mask in index.masks(first, CHUNK_BLOCKS):
            masks[block] = masks.get(block, 0) | mask | zero_mask
    newer = _shown(load_indices(now, pair.now[::-1], helpers), first, masks.keys())
    older = _shown(load_indices(then, pair.then[::-1], helpers), first, masks.keys())
    return {block: _differing(newer.get(block, _NOTHING), older.get(block, _NOTHING)) for block in masks}


class _Block:
    """Where the sectors of a block come from: payloads, newest first, with the sectors that show of each."""

    __slots__ = ("covered", "payloads", "shown")

    def __init__(self) -> None:
        self.payloads: dict[tuple[bytes, int], int] = {}
        self.covered = self.shown = 0

    def below(self, mask: int, zero_mask: int, digest: bytes) -> None:
        """One more entry, older than those before."""
        show = mask & ~self.covered
        if show:
            key = digest, mask
            self.payloads[key] = self.payloads.get(key, 0) | show
        self.shown |= show
        self.covered |= mask | zero_mask


_NOTHING = _Block()


def _shown(indices: Sequence[PackIndex], first: int, blocks: Set[int]) -> dict[int, _Block]:
    found: dict[int, _Block] = {}
    for index in indices:
        for entry in index.range(first, CHUNK_BLOCKS):
            if entry.block in blocks:
                found.setdefault(entry.block, _Block()).below(entry.mask, entry.zero_mask, entry.hash)
    return found


def _differing(now: _Block, then: _Block) -> int:
    """The sectors that may differ: neither from equal payloads nor zeros in both."""
    same = ~(now.shown | then.shown)
    for key, shown in now.payloads.items():
        same |= shown & then.payloads.get(key, 0)
    return FULL_MASK & ~same


def bit_runs(mask: int) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of bits that are set, ascending."""
    at = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        length = (~mask & (mask + 1)).bit_length() - 1
        mask >>= length
        yield at + skip, at + skip + length
        at += skip + length
