"""A digest of a log: evidence that a root was made from this log and no other.

The nonce of a commit is drawn and kept on the disk before the root is put. If the disk fails, a restart would
not know the nonce, and one that was kept before proves nothing: a copy of the cache directory has it too. So
the nonce is then a hash of the segments that the root includes. Whoever has the same segments may go on from
that root, which holds what they hold.
"""

from __future__ import annotations

from collections.abc import Callable

from blake3 import blake3

from glidefs.core.gather import Gather
from glidefs.formats.manifest import Root
from glidefs.formats.pack import ID_SIZE

_ENTRIES = 64
"""Gathered blocks that are in memory at once."""


class LogDigest:
    """Hashes of the segments of one log, from one on: each of those before and its own data.

    ``gather(first, last)`` replays segments. For one thread at a time.
    """

    def __init__(self, gather: Callable[[int, int], Gather]) -> None:
        self._gather = gather
        self._first = 0
        self._hashes: list[bytes] = []

    def nonce(self, root: Root, after: int, last: int) -> bytes | None:
        """For ``root``, which includes the segments behind ``after``. Raises CorruptLog, CoreError.

        None for one that cannot be made of a log of which ``after`` to ``last`` are here.
        """
        if not after <= root.last_segment <= last:
            return None
        own = blake3(b"a root made of its log")
        own.update(root.log_id)
        for number in (root.sequence, root.size, after, root.last_segment):
            own.update(number.to_bytes(8, "little"))
        own.update(self._through(after + 1, root.last_segment))
        return own.digest(length=ID_SIZE)

    def _through(self, first: int, last: int) -> bytes:
        if first != self._first:
            self._first, self._hashes = first, []
        for seq in range(first + len(self._hashes), last + 1):
            before = self._hashes[-1] if self._hashes else b""
            self._hashes.append(self._of_segment(seq, before))
        return self._hashes[last - first] if last >= first else b""

    def _of_segment(self, seq: int, before: bytes) -> bytes:
        digest = blake3(before)
        with self._gather(seq, seq) as gather:
            for extent in gather.extents():
                digest.update(extent.block.to_bytes(8, "little") + extent.count.to_bytes(8, "little"))
            for first in range(0, len(gather), _ENTRIES):
                count = min(_ENTRIES, len(gather) - first)
                for entry in gather.entries(first, count):
                    digest.update(b"".join(part.to_bytes(8, "little") for part in entry))
                data = bytearray(gather.nbytes(first, count))
                gather.fill(first, count, data)
                digest.update(data)
        return digest.digest()
