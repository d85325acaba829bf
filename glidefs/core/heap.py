"""The C heap: what uploads free goes back to the kernel, what requests free does not.

Left to itself glibc keeps large buffers. Its limit for mappings of their own grows to 32 MiB with the first
one that is freed, so packs in the making end up in the heaps of threads, which do not shrink (mallopt(3),
malloc_trim(3)). With that limit set by hand it gives back whatever is more than 128 KiB at the end of a
heap: then each request of that size takes 32 page faults, twice the CPU time of all the rest. Elsewhere than
on glibc these functions do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import time
from collections.abc import Iterator

LARGE = 2 << 20
"""Buffers from here on get mappings of their own, which end when they are freed."""
KEPT = 8 << 20
"""What each heap keeps at its end between two trims: the buffers of requests."""
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_PAUSE = 1.0

_lock = threading.Lock()  # guards the time of the last trim
_last = [float("-inf")]


def buffer(size: int) -> memoryview:
    """Zeroed memory of its own, for a pack in the making; it ends with the last view of it.

    In huge pages where the kernel has them: a page fault for each 4 KiB took an eighth of an upload's time.
    """
    if not size:
        return memoryview(bytearray())
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(area)


class Bodies:
    """Buffers of ``size`` bytes that go from one pack in the making to the next.

    There are as many as were ever in use at once, until :meth:`drop`: new memory is what costs.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()  # guards the list
        self._free: list[memoryview] = []

    @contextlib.contextmanager
    def borrow(self) -> Iterator[memoryview]:
        """One of them, with whatever is in it, for the length of the block."""
        with self._lock:
            body = self._free.pop() if self._free else None
        body = buffer(self.size) if body is None else body
        try:
            yield body
        finally:
            with self._lock:
                self._free.append(body)

    def drop(self) -> None:
        """Free those that are not in use."""
        with self._lock:
            self._free.clear()


def keep_large_buffers_apart() -> None:
    """Once, early in the process."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE)
        mallopt(_M_TRIM_THRESHOLD, KEPT)


def trim() -> None:
    """Give back what is free; at most once a second, as it takes some milliseconds."""
    with _lock:
        now = time.monotonic()
        if now - _last[0] < _PAUSE:
            return
        _last[0] = now
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
