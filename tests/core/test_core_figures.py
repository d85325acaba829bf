"""State and counters of many volumes at once say what those of each volume say."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from core_rig import BLOCK, MIB, CoreRig, Vol, pattern
from hypothesis import given, settings
from hypothesis import strategies as st

from glidefs.core import figures
from glidefs.core.check import Closed
from glidefs.core.volume import CoreVolume

Action = tuple[str, int, int]
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "read", "flush", "commit", "close"]),
        st.integers(0, 6),
        st.integers(0, 9),
    ),
    max_size=30,
)


def alone(call: Callable[[], object]) -> object:
    """What a volume says for itself; None: it is closed."""
    try:
        return call()
    except Closed:
        return None


def do(vol: Vol, action: str, block: int) -> None:
    if action == "write":
        vol.core.pwrite(block * BLOCK, pattern(block, 8192), fua=block % 2 == 0)
    elif action == "zero":
        vol.core.zero(block * BLOCK, BLOCK)
    elif action == "read":
        vol.core.pread(block * BLOCK, 4096)
    elif action == "flush":
        vol.core.flush()
    elif action == "commit":
        vol.commit()
    else:
        vol.close()


@settings(deadline=None)
@given(actions=ACTIONS)
def test_many_at_once_say_what_each_says(actions: list[Action]) -> None:
    """On two workers, closed ones among them, in the order asked for."""
    with tempfile.TemporaryDirectory() as directory, closing(CoreRig(Path(directory), workers=2)) as rig:
        vols = [rig.vol((index + 1) * MIB * 2) for index in range(7)]
        for action, index, block in actions:
            with suppress(Closed):
                do(vols[index], action, block)
        compare(vols)


def compare(vols: list[Vol]) -> None:
    cores = [vol.core for vol in vols]
    assert figures.infos(cores) == [alone(core.info) for core in cores]
    assert figures.infos(cores[::-1]) == [alone(core.info) for core in cores[::-1]]
    assert figures.stats(cores) == [alone(core.stats) for core in cores]


def test_more_than_one_call_takes(rig: CoreRig) -> None:
    sizes = [(index + 1) * 4096 for index in range(2 * figures.AT_ONCE + 3)]
    vols = [rig.vol(size) for size in sizes]
    vols[figures.AT_ONCE].close()
    sizes[figures.AT_ONCE] = 0
    cores = [vol.core for vol in vols]
    assert [info.size if info else 0 for info in figures.infos(cores)] == sizes
    assert [stats is not None for stats in figures.stats(cores)] == [size > 0 for size in sizes]
    assert figures.infos([]) == []
    assert figures.stats([]) == []


def test_workers_that_have_ended_tell_nothing(rig: CoreRig) -> None:
    cores = [rig.vol().core for _ in range(3)]
    cores[0].pwrite(0, pattern(1, 4096))
    rig.engine.end_workers()
    assert figures.infos(cores) == [None] * 3
    found = figures.stats(cores)
    assert found[0] is not None
    assert found[0].ops == (0, 1, 0, 0)


def test_histograms_of_what_was_used(rig: CoreRig) -> None:
    """Idle operations are not unpacked: those that happened are whole."""
    used, idle = rig.vol(), rig.vol()
    for block in range(5):
        used.core.pwrite(block * BLOCK, pattern(block, 4096))
    found = figures.stats([idle.core, used.core])
    assert found[0] is not None
    assert found[1] is not None
    assert [sum(counts) for counts in found[0].latency] == [0, 0, 0, 0]
    assert [sum(counts) for counts in found[1].latency] == [0, 5, 0, 0]
    assert [len(counts) for counts in found[0].latency + found[1].latency] == [64] * 8
    assert found[1].bytes == (0, 5 * 4096, 0, 0)


def test_while_volumes_come_and_go(rig: CoreRig) -> None:
    """A close waits for a call that looks at the volume; the call finds each volume open or closed."""
    stay = [rig.vol(4096 * (index + 1)) for index in range(4)]
    current: list[CoreVolume] = [vol.core for vol in stay]
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            vol = rig.vol(MIB)
            current[2] = vol.core
            vol.close()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(200):
            asked = list(current)
            told = figures.infos(asked)
            assert [info.size for info in (told[0], told[1], told[3]) if info] == [4096, 8192, 16384]
            assert told[2] is None or told[2].size in (MIB, 3 * 4096)
            assert len(figures.stats(asked)) == 4
    finally:
        stop.set()
        thread.join()
