"""The sampler on volumes of a real core, with a clock of its own."""

from __future__ import annotations

import math

import pytest
from core_rig import BLOCK, CoreRig, Vol, pattern

from glidefs.core.brief import IDLE, briefs
from glidefs.core.volume import CoreVolume
from glidefs.live.ring import LENGTH, STEP
from glidefs.live.sampler import FORGOTTEN, Key, Sampler


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """Volumes, and a sampler whose thread is the test."""

    def __init__(self, rig: CoreRig, *names: str) -> None:
        self.clock = Clock()
        self.vols: dict[Key, Vol] = {(name, "id"): rig.vol() for name in names}
        self.sampler = Sampler(self.cores, clock=self.clock)
        self.sampler._tick, self.sampler._dirty = self.sampler._look(self.cores(), self.sampler._tick)

    def cores(self) -> dict[Key, CoreVolume]:
        return {key: vol.core for key, vol in self.vols.items()}

    def step(self, steps: int = 1) -> None:
        self.clock.now += STEP * steps
        self.sampler.sample()

    def write(self, name: str, blocks: int) -> None:
        for block in range(blocks):
            self.vols[name, "id"].core.pwrite(block * BLOCK, pattern(block, 4096))

    def series(self, name: str, field: str) -> list[float | None]:
        return self.sampler.history((name, "id"))[1][field]


def test_briefs_say_what_the_counters_say(rig: CoreRig) -> None:
    used, idle, closed = rig.vol(), rig.vol(), rig.vol()
    for block in range(5):
        used.core.pwrite(block * BLOCK, pattern(block, 4096))
        used.core.pread(block * BLOCK, 4096)
    closed.close()
    found = briefs([idle.core, closed.core, used.core])
    assert found[0] is IDLE
    assert found[1] is None
    stats = used.core.stats()
    assert found[2] is not None
    sums = stats.latency_sum_ns
    assert found[2].numbers[:16] == (*stats.ops, *stats.bytes, *stats.errors, *sums)
    others = (stats.faults, stats.log_hits, stats.cache_reads, stats.zero_reads, stats.rmw, stats.syncs)
    assert found[2].numbers[16:] == (*others, stats.log_full_waits, stats.map_full_waits, stats.paced)


def test_an_hour_of_samples(rig: CoreRig) -> None:
    watched = Watched(rig, "a", "idle")
    watched.step()
    watched.write("a", 20)
    watched.sampler.sample()
    watched.clock.now += 0.001
    watched.sampler.sample()
    watched.clock.now -= 0.001
    watched.step()
    watched.step()
    assert watched.series("a", "write_iops") == [0.0, 2.0, 0.0]
    (zero, first, second) = watched.series("a", "dirty_bytes")
    assert zero == 0.0
    assert first == second
    assert first is not None
    assert 20 * 4096 <= first <= 21 * 4096
    assert watched.series("idle", "write_iops") == [0.0, 0.0, 0.0]
    assert ("idle", "id") not in watched.sampler._rings
    watched.vols["idle", "id"].core.pread(0, 4096)
    watched.step()
    assert watched.series("idle", "read_iops")[-1] == pytest.approx(0.1, rel=1e-3)
    for _ in range(LENGTH):
        watched.step()
    assert watched.series("a", "write_iops") == [0.0] * LENGTH
    assert watched.series("idle", "read_iops") == [0.0] * LENGTH
    assert list(watched.sampler._rings) == [("a", "id")]  # which has data that is not uploaded


def test_samples_that_were_missed_are_not_zeros(rig: CoreRig) -> None:
    watched = Watched(rig, "a")
    watched.write("a", 10)
    watched.step()
    watched.write("a", 30)
    watched.step(3)
    assert watched.series("a", "write_iops") == [1.0, None, None, 1.0]


def test_now_is_since_the_look_before(rig: CoreRig) -> None:
    watched = Watched(rig, "a", "idle")
    watched.clock.now += 4.0
    watched.write("a", 20)
    now = watched.sampler.now()
    assert now.seconds == 4.0
    assert list(now.rates) == [("a", "id")]
    assert now.rates["a", "id"].write_iops == 5.0
    # Who asks again soon gets what was since the first question, not a rate of an instant.
    watched.clock.now += 0.25
    assert watched.sampler.now().seconds == 4.25
    watched.clock.now += 1.75
    now = watched.sampler.now()
    assert (now.seconds, now.rates) == (2.0, {})
    watched.step()
    watched.clock.now += 2.0
    assert watched.sampler.now().seconds == 2.0


def test_what_nobody_asks_for_is_given_up(rig: CoreRig) -> None:
    watched = Watched(rig, "a")
    watched.clock.now += 2.0
    watched.sampler.now()
    assert watched.sampler._asked is not None
    for _ in range(math.ceil(FORGOTTEN / STEP) + 1):
        watched.step()
    assert watched.sampler._asked is None


def test_exports_come_and_go(rig: CoreRig) -> None:
    """A new one begins at zero, and one of the same name has no part in the other's history."""
    watched = Watched(rig, "a")
    watched.write("a", 10)
    watched.step()
    watched.vols["b", "id"] = rig.vol()
    watched.write("b", 20)
    watched.vols.pop(("a", "id")).close()
    watched.vols["a", "other"] = rig.vol()
    watched.step()
    assert watched.series("b", "write_iops") == [0.0, 2.0]
    assert ("a", "id") not in watched.sampler._rings
    assert watched.sampler.history(("a", "other"))[1]["write_iops"] == [0.0, 0.0]
    watched.vols["new", "id"] = rig.vol()
    watched.write("new", 8)
    watched.clock.now += 4.0
    assert watched.sampler.now().rates["new", "id"].write_iops == 2.0


def test_what_the_store_got(rig: CoreRig) -> None:
    watched = Watched(rig, "a")
    watched.write("a", 64)
    watched.step()
    watched.vols["a", "id"].commit()
    watched.clock.now += 2.0
    now = watched.sampler.now()
    assert 32 * 4096 <= now.drained["a", "id"] <= 34 * 4096
