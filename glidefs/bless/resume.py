"""Resuming an interrupted bless: its checkpoint, and which of its packs can be reused.

A later bless reads the image anew. As long as the blocks are those of the checkpoint's packs, in their
order, they are only hashed; from the first difference on new packs are made. So it does not matter
whether the image is the same one: what is published is always what was read.

gc keeps what a checkpoint names until it removes that. A bless that goes on first puts it anew under its
ETag, and gc replaces it under its ETag before it deletes it: so only one of them has it (see
:mod:`glidefs.gc.run`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from glidefs import names
from glidefs.errors import Conflict, CorruptObject, NotFound, PreconditionFailed, StoreError
from glidefs.formats.blessing import PutPack, decode_blessing, encode_blessing, make_blessing
from glidefs.formats.manifest import PackRef
from glidefs.formats.pack import (
    CHUNK_BLOCKS,
    FULL_MASK,
    HEADER_SIZE,
    PackEntry,
    decode_index,
    decode_payload,
)
from glidefs.store.base import Buffer, ObjectStore
from glidefs.store.checked import get_checked
from glidefs.store.clock import store_time

log = logging.getLogger(__name__)


class DonePack(NamedTuple):
    """A pack that the store has, the chunks that it has blocks of, and the time before it was put."""

    ref: PackRef
    chunks: tuple[int, ...]
    put_at: int


def load(store: ObjectStore, prefix: str, base: str, now: int, max_age: float) -> list[PutPack]:
    """The packs of the checkpoint, up to the first that is older than ``max_age`` seconds.

    Ages count by the store's clock since the checkpoint was put, and before that by the clock of whoever put
    it. The result says when they were put by the clock here, which shows ``now`` (unix seconds). The
    checkpoint is put anew with just these packs. One that cannot be read, or that somebody else takes at the
    same time, is as good as none. Raises StoreError.
    """
    key = names.blessing_key(prefix, base)
    try:
        blessing, found = get_checked(store, key, decode_blessing)
        info = store.head(key)
    except NotFound:
        return []
    except CorruptObject as error:
        log.warning("%s; beginning anew", error)
        return []
    age = store_time(store, prefix) - info.last_modified
    usable: list[PutPack] = []
    for pack in blessing.packs:
        pack_age = age + blessing.saved_at - pack.put_at
        if not 0 <= pack_age <= max_age:
            break
        usable.append(PutPack(pack.ref, max(0, now - math.ceil(pack_age))))
    if usable:
        claim = encode_blessing(make_blessing(blessing.started_at, usable, now), key)
        if found.etag != info.etag or not _replace(store, key, claim, found.etag):
            log.warning("the checkpoint of base %s is being used or removed; beginning anew", base)
            return []
    return usable


def _replace(store: ObjectStore, key: str, data: bytes, etag: str) -> bool:
    """Put an object over the version with this ETag; False if it is another one by now."""
    try:
        store.put(key, data, if_match=etag)
    except (PreconditionFailed, Conflict):
        try:
            return store.get(key).data == data  # our own, whose answer was lost
        except NotFound:
            return False
    return True


def save(store: ObjectStore, prefix: str, base: str, started_at: int, packs: Sequence[DonePack]) -> None:
    """Write the checkpoint. Best effort: without it there is only more to do again."""
    put = tuple(PutPack(pack.ref, pack.put_at) for pack in packs)
    try:
        key = names.blessing_key(prefix, base)
        store.put(key, encode_blessing(make_blessing(started_at, put, int(time.time())), key))
    except StoreError as error:
        log.warning("no checkpoint of base %s: %s", base, error)


def forget(store: ObjectStore, prefix: str, base: str) -> None:
    """Delete the checkpoint. Best effort: gc does it too, once the base is there."""
    try:
        store.delete(names.blessing_key(prefix, base))
    except StoreError as error:
        log.warning("the checkpoint of base %s stays: %s", base, error)


class Matcher:
    """Compares the blocks of an image with the packs of a checkpoint. Used by one thread.

    ``reused`` are the packs whose blocks all came. ``active`` ends with the first difference; other
    threads may look at it.
    """

    def __init__(self, store: ObjectStore, prefix: str, packs: Sequence[PutPack]) -> None:
        self._store = store
        self._prefix = prefix
        self._left = list(reversed(packs))
        self._current: PutPack | None = None
        self._entries: list[PackEntry] = []
        self._taken = 0
        self.reused: list[DonePack] = []
        self.active = bool(packs)

    def count(self, blocks: Sequence[int], hashes: Sequence[bytes]) -> int:
        """How many of the next blocks of the image, from the first of these, are there. Raises StoreError."""
        if not self.active:
            return 0
        for i, (block, digest) in enumerate(zip(blocks, hashes, strict=True)):
            entry = self._expected()
            if entry is None or (entry.block, entry.hash, entry.mask) != (block, digest, FULL_MASK):
                self.active = False
                return i
            self._taken += 1
        return len(blocks)

    def rest(self) -> tuple[list[PackEntry], Buffer]:
        """After the last match: entries and payloads of those blocks whose pack is not used as a whole.

        They were read once and may be gone from a pipe, so they come from the store, verified. Raises
        CorruptObject, NotFound, StoreError.
        """
        self.active = False
        if self._taken == len(self._entries):
            self._complete()
            return [], b""
        entries = self._entries[: self._taken]
        if not entries or self._current is None:
            return [], b""
        key = names.pack_key(self._prefix, self._current.ref.id.hex())
        end = entries[-1].offset + entries[-1].stored
        area = memoryview(self._store.get_range(key, HEADER_SIZE, end - HEADER_SIZE))
        for entry in entries:
            at = entry.offset - HEADER_SIZE
            decode_payload(key, entry, area[at : at + entry.stored])
        self._taken = 0
        return entries, area

    def _expected(self) -> PackEntry | None:
        while self._taken == len(self._entries):
            self._complete()
            if not self._load_next():
                return None
        return self._entries[self._taken]

    def _complete(self) -> None:
        """The current pack is used as a whole."""
        if self._current is not None:
            chunks = tuple(sorted({entry.block // CHUNK_BLOCKS for entry in self._entries}))
            self.reused.append(DonePack(self._current.ref, chunks, self._current.put_at))
        self._current, self._entries, self._taken = None, [], 0

    def _load_next(self) -> bool:
        if not self._left:
            return False
        pack = self._left.pop()
        key = names.pack_key(self._prefix, pack.ref.id.hex())
        try:
            tail, size = self._store.get_suffix(key, pack.ref.index_length)
            if size != pack.ref.size:
                raise CorruptObject(
                    key, size, f"the pack has {size} bytes, the checkpoint says {pack.ref.size}"
                )
            self._entries = list(decode_index(key, tail, size, pack.ref.id).entries())
        except (CorruptObject, NotFound) as error:
            log.warning("a pack of the interrupted bless is of no use: %s", error)
            return False
        self._current = pack
        return True
