"""A guest that knows what it wrote: requests in flight all the time, every read compared."""

from __future__ import annotations

import random
import struct
import threading
import time

from handoff_rig import Generations
from nbd_client import FLUSH, READ, WRITE, RawClient

BLOCK = 4096
BLOCKS = 256
DEPTH = 8
PAUSE = 0.002
"""Seconds between two batches: the load is light, so that many can run side by side."""


def content(block: int, stamp: int) -> bytes:
    """What a block holds after write number ``stamp``; 0: it was never written."""
    return struct.pack("<QQ", block, stamp) * (BLOCK // 16) if stamp else bytes(BLOCK)


class Guest(threading.Thread):
    """Batches of writes and reads on blocks that differ, until :meth:`finish`; any error ends it."""

    def __init__(self, node: Generations, export: str, seed: int, patience: float) -> None:
        super().__init__(daemon=True)
        self._node, self._export, self._patience = node, export, patience
        self._random = random.Random(seed)
        self._end = threading.Event()
        self._stamps = [0] * BLOCKS
        self._writes = 0
        self.batches = 0
        self.longest = 0.0
        """Seconds that the slowest batch took."""
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self._node.nbd(self._export, self._patience) as client:
                while not self._end.wait(PAUSE):
                    began = time.monotonic()
                    self._batch(client)
                    self.longest = max(self.longest, time.monotonic() - began)
                    self.batches += 1
        except BaseException as error:
            self.error = error

    def _batch(self, client: RawClient) -> None:
        chosen = self._random.sample(range(BLOCKS), DEPTH)
        asked: dict[int, tuple[int, int]] = {}
        for block in chosen[: DEPTH // 2]:
            self._writes += 1
            data = content(block, self._writes)
            asked[client.submit(WRITE, block * BLOCK, BLOCK, data=data)] = WRITE, block
            self._stamps[block] = self._writes
        for block in chosen[DEPTH // 2 :]:
            asked[client.submit(READ, block * BLOCK, BLOCK)] = READ, block
        if self._writes % 64 == 0:
            asked[client.submit(FLUSH)] = FLUSH, 0
        while asked:
            cookie, error = client.reply()
            kind, block = asked.pop(cookie)
            assert not error, f"errno {error} from {kind} of block {block}"
            if kind == READ:
                self._compare(block, client.read(BLOCK))

    def _compare(self, block: int, found: bytes) -> None:
        expected = content(block, self._stamps[block])
        assert found == expected, f"block {block}: {found[:16].hex()} is not {expected[:16].hex()}"

    def went_on(self, batches: int = 5) -> bool:
        """Whether it has made that many since it was asked first; raises what went wrong."""
        if self.error is not None:
            raise self.error
        since = getattr(self, "_since", None)
        if since is None:
            self._since = since = self.batches
        if self.batches < since + batches:
            return False
        del self._since
        return True

    def finish(self) -> None:
        """End it, and read every block back on a new connection."""
        self._end.set()
        self.join(self._patience)
        assert not self.is_alive(), "the guest still waits"
        if self.error is not None:
            raise self.error
        self.verify()

    def verify(self) -> None:
        """Every block is what was written last."""
        with self._node.nbd(self._export, self._patience) as client:
            for block in range(BLOCKS):
                self._compare(block, client.pread(block * BLOCK, BLOCK))
