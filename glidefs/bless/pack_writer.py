"""Packs of an image: filled in the order of its blocks, put by a few threads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from glidefs.bless.pipeline import Batch
from glidefs.bless.resume import DonePack
from glidefs.core import heap
from glidefs.formats.pack import BLOCK, FULL_MASK, HEADER_SIZE, PACK_TARGET, PackEntry
from glidefs.store.base import Buffer, ObjectStore
from glidefs.store.packs import put_pack

PUTS = 2
"""Packs that are put at the same time; with the one being filled they bound the memory."""
MAX_BLOCKS = 1 << 15
"""Blocks in a pack: where they compress to nothing, their entries take more memory than they do."""
CHECKPOINT_EVERY = 4
"""Packs between two checkpoints, of a small image."""

Checkpoint = Callable[[Sequence[DonePack]], None]


class PackWriter:
    """One thread fills; the threads of the pool put what is full, and touch nothing else.

    ``packs`` are those that the store has, in order. ``checkpoint`` is called in a thread of the
    pool, now and then, with the packs so far.
    """

    def __init__(
        self, store: ObjectStore, prefix: str, volume_id: bytes, pack_bytes: int, checkpoint: Checkpoint
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._volume_id = volume_id
        self._limit = max(BLOCK, min(pack_bytes, PACK_TARGET))
        self._checkpoint = checkpoint
        self.packs: list[DonePack] = []
        self._pool = ThreadPoolExecutor(PUTS, "bless-put")
        self._running: deque[tuple[Future[DonePack], memoryview | None]] = deque()
        self._saving: Future[None] | None = None
        self._saved = 0
        self._free: list[memoryview] = []
        self._buffers = 0
        self._area: memoryview | None = None
        self._used = 0
        self._entries: list[PackEntry] = []

    def add(self, batch: Batch, first: int) -> None:
        """Add the blocks of a compressed batch from index ``first`` on. Raises StoreError of earlier puts."""
        assert batch.stored is not None
        at = sum(batch.stored[:first])
        for block, digest, stored in zip(
            batch.blocks[first:], batch.hashes[first:], batch.stored[first:], strict=True
        ):
            if self._used + stored > self._limit or len(self._entries) >= MAX_BLOCKS:
                self.flush()
            if self._area is None:
                self._area = self._buffer()
            self._area[self._used : self._used + stored] = batch.out[at : at + stored]
            offset = HEADER_SIZE + self._used
            self._entries.append(PackEntry(block, FULL_MASK, 0, offset, stored, digest))
            self._used += stored
            at += stored

    def flush(self) -> None:
        """Put what there is as a pack."""
        if self._area is not None:
            self._submit(self._area[: self._used], self._entries, self._area)
        self._area, self._used, self._entries = None, 0, []
        while self._running and self._running[0][0].done():
            self._harvest()

    def put(self, entries: list[PackEntry], area: Buffer) -> None:
        """Put a pack of its own."""
        if entries:
            self._submit(area, entries, None)

    def finish(self) -> list[DonePack]:
        """Put the last pack, wait for all of them. Raises StoreError."""
        self.flush()
        while self._running:
            self._harvest()
        self.close()
        return self.packs

    def close(self) -> None:
        """Wait until no thread does anything any more; what was not begun is given up."""
        self._pool.shutdown(cancel_futures=True)

    def abandon(self) -> None:
        """The same, and take in what was put, for a last checkpoint."""
        self.close()
        while self._running and not self._running[0][0].cancelled() and not self._running[0][0].exception():
            self._harvest(checkpoint=False)

    def _buffer(self) -> memoryview:
        while not self._free:
            if self._buffers <= PUTS:
                self._buffers += 1
                return heap.buffer(self._limit)
            self._harvest()
        return self._free.pop()

    def _submit(self, area: Buffer, entries: list[PackEntry], buffer: memoryview | None) -> None:
        self._running.append((self._pool.submit(self._put, area, entries), buffer))

    def _put(self, area: Buffer, entries: list[PackEntry]) -> DonePack:
        put_at = int(time.time())
        pack = put_pack(self._store.put, self._prefix, self._volume_id, area, entries, 0)
        return DonePack(pack.ref, pack.chunks, put_at)

    def _harvest(self, checkpoint: bool = True) -> None:
        """Take in the oldest pack under way; waits for it."""
        future, buffer = self._running.popleft()
        self.packs.append(future.result())
        if buffer is not None:
            self._free.append(buffer)
        # Fewer of many: each checkpoint lists all of them.
        due = len(self.packs) - self._saved >= max(CHECKPOINT_EVERY, len(self.packs) // 32)
        if checkpoint and due and (self._saving is None or self._saving.done()):
            self._saved = len(self.packs)
            self._saving = self._pool.submit(self._checkpoint, tuple(self.packs))
