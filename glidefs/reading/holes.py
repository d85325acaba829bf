"""What is zero of a whole page of the manifest, or of a whole chunk, as the core is told it.

A set of parts (the chunks of a page, the blocks of a chunk) is an int of ``GROUP`` bits here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from glidefs.core.volume import GROUP, CoreVolume, Holes, chunk_holes, install_retry, page_holes
from glidefs.formats.manifest import PAGE_CHUNKS
from glidefs.formats.pack import CHUNK_BLOCKS, PackIndex
from glidefs.manifest.cache import LoadingCache
from glidefs.manifest.view import Manifest

ALL = (1 << GROUP) - 1
KEPT = 512
"""Chunks whose holes are kept, a few hundred bytes each."""


def holes_of_page(manifest: Manifest, page: int) -> Holes:
    """The chunks of a page that the manifest does not have, those behind the end of the volume too.

    Raises as :meth:`Manifest.page`.
    """
    return page_holes(page, ALL & ~_bits(manifest.page(page).chunks))


def holes_of_chunk(chunk: int, indices: Sequence[PackIndex]) -> Holes:
    """The blocks of a chunk that are zeros, by the indices of its packs, newest first.

    They are exactly the blocks that :func:`glidefs.reading.plan.plan_block` finds no data of.
    """
    first = chunk * CHUNK_BLOCKS
    covered = [0] * CHUNK_BLOCKS
    data: set[int] = set()
    for index in indices:
        for block, mask, zero_mask in index.masks(first, CHUNK_BLOCKS):
            i = block - first
            if mask & ~covered[i]:
                data.add(i)
            covered[i] |= mask | zero_mask
    return chunk_holes(chunk, ALL & ~_bits(data))


class ChunkHoles:
    """The same, kept by the packs: to go through their entries takes a third of a millisecond for each.

    A sparse chunk that is read in pieces asks for it with each of them.
    """

    def __init__(self) -> None:
        self._kept: LoadingCache[tuple[int, tuple[str, ...]], Holes] = LoadingCache(KEPT, lambda _: 1)

    def of(self, chunk: int, indices: Sequence[PackIndex]) -> Holes:
        """What :func:`holes_of_chunk` says."""
        key = chunk, tuple(index.key for index in indices)
        return self._kept.get(key, lambda: holes_of_chunk(chunk, indices))


class Zeros:
    """Blocks that a plan found to be zeros, with the pages and chunks around them.

    The core keeps zeros by page and chunk. So a hole is a fault once in each page of the manifest, and what
    is zero of a chunk that has packs once in each chunk.
    """

    def __init__(self, chunks: ChunkHoles) -> None:
        self._chunks = chunks
        self._runs: list[tuple[int, int]] = []
        self._holes: dict[tuple[bool, int], Holes] = {}

    def __bool__(self) -> bool:
        return bool(self._runs)

    def add_absent(self, manifest: Manifest, first: int, count: int) -> None:
        """Blocks of a chunk that no pack has. Raises as :meth:`Manifest.page`."""
        page = first // CHUNK_BLOCKS // PAGE_CHUNKS
        if (True, page) not in self._holes:
            self._holes[True, page] = holes_of_page(manifest, page)
        self._add_run(first, count)

    def add(self, block: int, indices: Sequence[PackIndex]) -> None:
        """A block of which the packs of its chunk have no data; ``indices`` are theirs, newest first."""
        chunk = block // CHUNK_BLOCKS
        if (False, chunk) not in self._holes:
            self._holes[False, chunk] = self._chunks.of(chunk, indices)
        self._add_run(block, 1)

    def _add_run(self, first: int, count: int) -> None:
        if self._runs and sum(self._runs[-1]) == first:
            first, count = self._runs[-1][0], self._runs.pop()[1] + count
        self._runs.append((first, count))

    def blocks(self) -> list[int]:
        """All of them."""
        return [block for first, count in self._runs for block in range(first, first + count)]

    def install(self, core: CoreVolume, stamp: int) -> None:
        """Tell the core, and let who waits for the blocks look again. Raises Closed, CoreError."""
        if self:
            core.install_holes(stamp, list(self._holes.values()))
            core.install(stamp, [install_retry(first, count) for first, count in self._runs])


def _bits(numbers: Iterable[int]) -> int:
    """The int with these bits."""
    digits = bytearray(b"0" * GROUP)
    for number in numbers:
        digits[GROUP - 1 - number] = ord("1")
    return int(digits, 2)
