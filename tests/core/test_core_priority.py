"""Threads that leave the CPU to requests (csrc/base/priority.c)."""

from __future__ import annotations

import os
import threading

import pytest

pytest.importorskip("glidefs.core._core")

from glidefs.core.priority import lower_priority


def test_only_the_thread_that_asks_yields() -> None:
    found: list[int] = []

    def ask() -> None:
        lower_priority(7)
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [max(7, before)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_what_the_kernel_refuses_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """A niceness that does not exist is a priority that stays what it is."""
    caplog.set_level("DEBUG")
    thread = threading.Thread(target=lower_priority, args=(1 << 20,), name="odd")
    thread.start()
    thread.join()
    assert all("odd" in record.getMessage() for record in caplog.records)
