"""Work on one thread while that is quick, and on more while it waits (glidefs/exports/crew.py)."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glidefs.exports.crew import PATIENCE, Crew


def test_what_is_quick_stays_on_one_thread() -> None:
    who: Counter[int] = Counter()
    began = time.monotonic()
    Crew(lambda item: who.update([threading.get_ident()]), 4, "crew").run(range(2000))
    # While this thread stands still each of the three others takes one a turn.
    turns = (time.monotonic() - began) / PATIENCE
    assert who[threading.get_ident()] > 1900 - 3 * turns
    assert sum(who.values()) == 2000


def test_what_waits_is_done_by_all() -> None:
    seen: list[int] = []
    busy, most, lock = 0, 0, threading.Lock()
    all_wait = threading.Barrier(4)

    def wait(item: int) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        if item < 4:
            all_wait.wait(20)
        time.sleep(5 * PATIENCE)
        with lock:
            busy -= 1
        seen.append(item)

    Crew(wait, 4, "crew").run(range(40))
    assert sorted(seen) == list(range(40))
    assert most == 4


def test_one_that_hangs_keeps_nobody_waiting() -> None:
    go, rest = threading.Event(), threading.Semaphore(0)

    def work(item: int) -> None:
        if item == 0:
            assert go.wait(20)
        rest.release()

    thread = threading.Thread(target=Crew(work, 2, "crew").run, args=(range(100),))
    thread.start()
    for _ in range(99):
        assert rest.acquire(timeout=20)
    go.set()
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("threads", [1, 2, 5])
@given(st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.012]), max_size=12))
def test_each_is_done_once(threads: int, pauses: list[float]) -> None:
    seen: list[int] = []

    def work(item: tuple[int, float]) -> None:
        time.sleep(item[1])
        seen.append(item[0])

    Crew(work, threads, "crew").run(enumerate(pauses))
    assert sorted(seen) == list(range(len(pauses)))
