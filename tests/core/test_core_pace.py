"""The pace of writers (csrc/base/pace.h), and who sets it (glidefs/writing/throttle.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
from core_rig import MIB, SECTOR, Background, CoreRig, pattern
from hypothesis import given
from hypothesis import strategies as st
from waiting import wait_for

from glidefs.core.check import Closed, CoreError
from glidefs.core.figures import OPS
from glidefs.writing import throttle
from glidefs.writing.throttle import LEAST, SOFT, DrainRate, Throttle, allowed
from glidefs.writing.upload import Life


def test_writers_of_all_volumes_together_keep_the_pace(rig: CoreRig) -> None:
    rig.engine.pace(4 * MIB)
    vols = [rig.vol(), rig.vol(directory=rig.tmp / "other", log_id=b"m" * 16)]
    began = time.monotonic()

    def write(number: int) -> None:
        for i in range(256):
            vols[number].core.pwrite(i * SECTOR, pattern(i, SECTOR))

    tasks = [Background(partial(write, number)) for number in (0, 1)]
    for task in tasks:
        task.result()
    took = time.monotonic() - began
    assert took > 0.35  # 2 MiB
    assert vols[0].core.stats().paced + vols[1].core.stats().paced
    rig.engine.pace(0)
    assert vols[0].core.pread(0, 256 * SECTOR) == vols[1].core.pread(0, 256 * SECTOR)


def slow(rig: CoreRig) -> tuple[Any, Background]:
    """A volume with a write that waits for its turn."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    rig.engine.pace(1)  # one byte per second: the first is free, the next waits for an hour
    vol.core.pwrite(0, pattern(1, SECTOR))
    before = vol.core.stats().paced
    task = Background(lambda: vol.core.pwrite(SECTOR, pattern(2, SECTOR)))
    wait_for(lambda: vol.core.stats().paced > before, "a write that waits")
    return vol, task


def test_reads_and_flushes_do_not_wait(rig: CoreRig) -> None:
    vol, task = slow(rig)
    assert vol.core.pread(0, SECTOR) == pattern(1, SECTOR)
    vol.core.flush()
    assert not task.done
    rig.engine.pace(4 * MIB)  # an hour of debt at the old rate is nothing at this one
    task.result()
    assert vol.core.pread(SECTOR, SECTOR) == pattern(2, SECTOR)


def test_a_volume_closes_while_its_writers_wait(rig: CoreRig) -> None:
    vol, task = slow(rig)
    vol.close()
    with pytest.raises((Closed, CoreError)):
        task.result()


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.integers(1, 1 << 40), st.floats(0, 1e10))
def test_the_fuller_the_slower(one: int, other: int, limit: int, drained: float) -> None:
    less, more = sorted((min(one, limit), min(other, limit)))
    first, second = allowed(less, limit, drained), allowed(more, limit, drained)
    if less / limit <= SOFT or drained <= 0:
        assert first == 0
    if first:
        assert LEAST <= second <= first
    if second and more == limit:
        assert second <= max(LEAST, drained)


def test_the_rate_of_uploads_is_that_of_several_commits() -> None:
    rate, written = DrainRate(), 0
    for tick in range(400):  # 100 bytes a second are written, and committed 200 at a time
        written = tick * 10
        found = rate.note(tick / 10, written, dirty=written % 200, commits=tick // 20)
        if tick > 100:
            assert 90 <= found <= 110


def test_what_is_counted_late_is_no_rate() -> None:
    """What is dirty may be counted before what was written, and less: not as if it had been uploaded."""
    rate = DrainRate()
    for tick in range(200):
        found = rate.note(tick / 10, written=tick * 10, dirty=max(0, tick * 10 - tick % 7), commits=0)
        assert found == throttle.ASSUMED
    assert rate.note(20.0, 2000, 1000, commits=1) == pytest.approx(50, abs=1)


def test_a_rate_begins_when_it_is_asked_for() -> None:
    """Uploads that stepped back before were not slow."""
    rate = DrainRate()
    rate.note(0.0, 1000, 1000, commits=1)
    rate.note(7.0, 8000, 8000, commits=1)
    rate.clear()
    rate.note(8.0, 9000, 9000, commits=1)
    assert rate.note(10.0, 11000, 10000, commits=2) == 500
    assert rate.note(11.0, 12000, 11000, commits=2) == 500
    assert 200 < rate.note(14.0, 15000, 14000, commits=2) < 500, "the next one is late"
    late = 10.0 + throttle.OUTAGE
    assert rate.note(late, 99000, 98000, commits=2) == 0, "it does not come"
    assert rate.note(late + 60, 99000, 97000, commits=3) == throttle.ASSUMED, "an outage is no slow upload"
    assert rate.note(late + 61, 99000, 95000, commits=4) == 2000


class Volume:
    def __init__(self, cookie: int) -> None:
        self.cookie, self.written, self.dirty, self.commits, self.core = cookie, 0, 0, 0, self


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the volumes above."""

    def infos(volumes: list[Volume]) -> list[Any]:
        return [SimpleNamespace(dirty_bytes=v.dirty, committed_seq=v.commits) for v in volumes]

    def stats(volumes: list[Volume]) -> list[Any]:
        return [SimpleNamespace(bytes=[v.written if op == "write" else 0 for op in OPS]) for v in volumes]

    monkeypatch.setattr(throttle, "infos", infos)
    monkeypatch.setattr(throttle, "stats", stats)


def throttle_of(
    volumes: list[Volume],
    paces: list[int],
    *,
    life: Life | None = None,
    away: bool = False,
    make_room: Callable[[], None] = lambda: None,
) -> Throttle:
    """Over a log of 1,000 MiB; ``paces`` gets what it sets."""
    engine = SimpleNamespace(stats=lambda: SimpleNamespace(log_limit=1000 * MIB), pace=paces.append)
    retirer = SimpleNamespace(make_room=make_room)
    return Throttle(
        cast(Any, engine), cast(Any, retirer), lambda: cast(Any, volumes), life or Life(), lambda: away
    )


@pytest.mark.usefixtures("figures")
def test_pace_comes_and_goes() -> None:
    paces: list[int] = []
    rooms: list[int] = []
    volumes, life = [Volume(1), Volume(2)], Life()
    made = throttle_of(volumes, paces, life=life, make_room=lambda: rooms.append(1))
    for tick in range(100):  # twice as fast as the uploads
        for volume in volumes:
            volume.written += 10 * MIB
            volume.dirty += 5 * MIB
            volume.commits += 1
        assert made.step(tick * 0.1)
        assert life.crowded == (sum(volume.dirty for volume in volumes) > SOFT * 1000 * MIB)
    assert rooms
    assert paces
    assert paces == sorted(paces, reverse=True)
    assert paces[-1] < 150 * MIB
    volumes[1].dirty = 0
    gone = volumes.pop()
    gone.written = 0  # another life
    volumes[0].dirty = 0
    assert not made.step(11.0)
    assert paces[-1] == 0
    count = len(paces)
    assert not made.step(12.0)
    assert len(paces) == count


@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize("known", [True, False])
def test_an_outage_slows_nobody(known: bool) -> None:
    """At once where the store is known to be away; else once nothing was committed for long."""
    paces: list[int] = []
    volume = Volume(1)
    made = throttle_of([volume], paces, away=known)
    volume.written = volume.dirty = 450 * MIB
    for tick in range(int(2 * throttle.OUTAGE / 0.1)):
        volume.written += MIB
        volume.dirty += MIB
        made.step(tick * 0.1)
    assert not any(paces) if known else paces[-1] == 0
    assert known or any(paces)


@pytest.mark.usefixtures("figures")
def test_before_the_first_commit_writers_slow_down_too() -> None:
    """As if uploads were of a modest speed: else the log is full before one says how fast they are."""
    paces: list[int] = []
    volume = Volume(1)
    made = throttle_of([volume], paces)
    for tick in range(100):  # as fast as they may, or 400 MiB a second
        volume.dirty += min([*paces[-1:], 400 * MIB]) // 10
        volume.written = volume.dirty
        made.step(tick * 0.1)
    assert paces == sorted(paces, reverse=True)
    assert 650 * MIB < volume.dirty < 950 * MIB
