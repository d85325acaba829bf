"""Buffers of packs in the making, which go from one to the next."""

from __future__ import annotations

import mmap
import threading

from glidefs.core._core import ffi
from glidefs.core.heap import Bodies


def address(body: memoryview) -> int:
    return int(ffi.cast("uintptr_t", ffi.from_buffer(body)))


def test_a_body_is_used_again() -> None:
    bodies = Bodies(3 * mmap.PAGESIZE + 16)
    with bodies.borrow() as first:
        assert len(first) == bodies.size
        assert address(first) % mmap.PAGESIZE == 0
        first[:5] = b"first"
        with bodies.borrow() as second:
            assert address(second) != address(first)
    with bodies.borrow() as again:
        assert again[:5] == b"first"


def test_what_is_dropped_is_new_the_next_time() -> None:
    bodies = Bodies(mmap.PAGESIZE)
    with bodies.borrow() as body:
        body[:4] = b"used"
        bodies.drop()  # not what is in use
        assert body[:4] == b"used"
    bodies.drop()
    with bodies.borrow() as body:
        assert body[:4] == bytes(4)


def test_nobody_shares_a_body() -> None:
    bodies = Bodies(mmap.PAGESIZE)
    together = threading.Barrier(4)
    found: list[bool] = []

    def use(name: bytes) -> None:
        for _ in range(100):
            together.wait()
            with bodies.borrow() as body:
                body[:4] = name
                together.wait()
                found.append(body[:4] == name)

    threads = [threading.Thread(target=use, args=(b"%04d" % i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 400
