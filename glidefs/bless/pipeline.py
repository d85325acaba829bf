"""The blocks of an image, hashed and compressed on all cores, in order.

The caller's thread reads and takes results; the others work on a batch each. There is a fixed number
of batches, which are used again and again: that bounds memory, and new memory is what costs.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

from glidefs.bless.source import Image
from glidefs.core import heap
from glidefs.core.payloads import compress_payloads
from glidefs.formats.pack import BLOCK, payload_hash

BATCH_BLOCKS = 16
MAX_WORKERS = 12
"""More could not be fed by one reader, and each has memory for a batch."""
SPARE = 6
"""Batches beyond one per worker: one is being filled, and the others go on when the oldest is late.

With 2, a bless on a busy host took a sixth longer: results are taken in order.
"""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, the latter 0 where nobody knows."""


class Batch:
    """Some blocks. ``stored`` has the lengths of their payloads in ``out``, or nothing if only hashed."""

    def __init__(self) -> None:
        self.plain = heap.buffer(BATCH_BLOCKS * BLOCK)
        self.out = heap.buffer(BATCH_BLOCKS * BLOCK)
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []
        self.stored: array[int] | None = None

    def hash(self) -> None:
        """Fill in ``hashes``."""
        self.stored = None
        ends = range(BLOCK, (len(self.blocks) + 1) * BLOCK, BLOCK)
        self.hashes = [payload_hash(self.plain[end - BLOCK : end]) for end in ends]

    def compress(self, level: int) -> None:
        """Fill in ``out`` and ``stored``."""
        count = len(self.blocks)
        self.stored = compress_payloads(self.plain[: count * BLOCK], [BLOCK] * count, self.out, level)


def batches(
    image: Image, workers: int, work: Callable[[Batch], None], progress: Progress | None
) -> Generator[Batch, None, None]:
    """The image, batch by batch, after ``work`` was done on each in some thread.

    A batch is the caller's until it asks for the next one. Raises ConfigError for an image that
    cannot be read.
    """
    workers = min(workers, MAX_WORKERS)
    free = [Batch() for _ in range(workers + SPARE)]
    running: deque[tuple[Batch, Future[None]]] = deque()
    with ThreadPoolExecutor(workers, "bless") as pool:
        while True:
            batch = free.pop()
            batch.blocks = image.fill(batch.plain)
            if progress:
                progress(image.position, image.length or 0)
            if not batch.blocks:
                break
            running.append((batch, pool.submit(work, batch)))
            if not free:
                yield _oldest(running, free)
        while running:
            yield _oldest(running, free)


def _oldest(running: deque[tuple[Batch, Future[None]]], free: list[Batch]) -> Batch:
    batch, future = running.popleft()
    future.result()
    free.append(batch)
    return batch
