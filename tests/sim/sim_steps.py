"""Steps of guests, uploads and time, and the faults that come with them."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from faulty_store import KINDS
from history import SECTOR, UNIT, ZERO, Span, tag_bytes
from power_cut import DIR, SYNC
from sim_model import NEVER, Life, must, same
from sim_node import GRACE, SimNode
from sim_world import World

from glidefs.core.check import Closed, CoreError
from glidefs.errors import Fenced, GlideError
from glidefs.manifest.commit import Superseded
from glidefs.volume.volume import Volume

Where = tuple[SimNode, Life, Volume]
MOST_FAULTS = 0.8
"""Of all requests: else nothing gets through, and what hangs hangs rightly."""


class Steps(World):
    """Each method is a step that ``Simulation`` may choose; one that finds nothing to do does nothing."""

    # -- choosing --------------------------------------------------------------------------------------

    def draw_volume(self) -> Where | None:
        """Any volume that guests rely on."""
        found = self.usable()
        return self.rng.choice(found) if found else None

    def draw_range(self, life: Life, unit: int, longest: int) -> tuple[int, int]:
        """(offset, length) in bytes inside of one hot area."""
        first, count = self.rng.choice(life.history.areas)
        units = count * SECTOR // unit
        at = self.rng.randrange(units)
        return first * SECTOR + at * unit, self.rng.randint(1, min(longest // unit, units - at)) * unit

    @contextlib.contextmanager
    def step_of(self, node: SimNode) -> Iterator[None]:
        """A step of this node is under way."""
        self.acting.append(node)
        try:
            yield
        finally:
            self.acting.pop()

    # -- one request of a guest ------------------------------------------------------------------------

    def _span(self, volume: Volume) -> Span:
        info = volume.core.info()
        low = max(info.sealed_seq, info.committed_seq) + 1
        return Span(self.platter.position(), NEVER, low, NEVER)

    def request(self, where: Where, what: str, run: Callable[[], Any]) -> Any:
        """A request of a guest; what went wrong with a volume that its node has lost is no matter (None)."""
        node, life, volume = where
        self.note(f"  {life}: {what}")
        self.platter.settle()
        with self.step_of(node):
            try:
                result = node.guest(volume.core, run)
            except (CoreError, Closed, GlideError) as error:
                node.check_alive()
                self.model.observe()
                if life.lost or volume.fenced:
                    return None
                must(life.sync_failed and isinstance(error, CoreError), f"{life}: {what}: {error}")
                raise
        self._crash_inside(node, what)
        return result

    def _crash_inside(self, node: SimNode, what: str) -> None:
        """Sometimes the node dies in the middle of what its log was doing."""
        if self.rng.random() >= self.crash_rate:
            return
        steps = self.platter.steps()
        at = self.rng.choice(steps) if steps else self.platter.position()
        self.note(
            f"  {node.name} crashes inside of it, at {steps.index(at) + 1 if steps else 0} of {len(steps)}"
        )
        self.counts["crash at disk"] += 1
        self.crash_at = at
        raise node.kill(what)

    crash_rate = 0.0
    crash_at: int | None = None
    """Where the operation under way was cut short, if it was."""

    def change(
        self, where: Where, offset: int, length: int, *, zero: bool = False, fua: bool = False
    ) -> None:
        """A write, or zeroes."""
        node, life, volume = where
        core = volume.core
        span = self._span(volume)
        what = f"{'zero' if zero else 'write'} {offset // UNIT}+{length // UNIT}" + (" fua" if fua else "")
        if zero:
            life.begin_zero(span, offset, length)
            run = partial(core.zero, offset, length)
        else:
            data = tag_bytes(next(self.tags), length)
            life.begin(span, offset, data)
            run = partial(core.pwrite, offset, data, fua=fua)
        try:
            self.request(where, what, run)
        except CoreError:
            # A sync failed: what was written is there, and may not outlast the power.
            life.settle(self.read(node, life, volume), volume.core.info().last_seq)
            return
        if volume.fenced or life.lost:
            life.pending = {}
            return
        info = core.info()
        life.end(self.platter.position(), max(span.low, info.last_seq, info.committed_seq))
        if fua:
            # Its own sync covers what was acknowledged before it, and itself.
            end = self.platter.position()
            life.flushes.append((end, end))

    def write(self) -> None:
        where = self.draw_volume()
        if where is not None:
            self.change(where, *self.draw_range(where[1], SECTOR, 40 * SECTOR))

    def write_small(self) -> None:
        where = self.draw_volume()
        if where is not None:
            self.change(where, *self.draw_range(where[1], SECTOR, 3 * SECTOR))

    def write_unaligned(self) -> None:
        where = self.draw_volume()
        if where is not None:
            self.change(where, *self.draw_range(where[1], UNIT, 9 * SECTOR))

    def write_through(self) -> None:
        where = self.draw_volume()
        if where is not None:
            self.change(where, *self.draw_range(where[1], SECTOR, 4 * SECTOR), fua=True)

    def zero(self) -> None:
        where = self.draw_volume()
        if where is not None:
            self.change(where, *self.draw_range(where[1], UNIT, 20 * SECTOR), zero=True)

    def discard(self) -> None:
        """From one place to another, gigabytes perhaps."""
        where = self.draw_volume()
        if where is None:
            return
        one, other = (
            self.draw_range(where[1], SECTOR, SECTOR)[0],
            self.draw_range(where[1], SECTOR, SECTOR)[0],
        )
        start, end = min(one, other), max(one, other) + SECTOR
        self.change(where, start, end - start, zero=True)

    def read_some(self) -> None:
        where = self.draw_volume()
        if where is None:
            return
        _, life, volume = where
        offset, length = self.draw_range(life, UNIT, 40 * SECTOR)
        got = self.request(
            where, f"read {offset // UNIT}+{length // UNIT}", partial(volume.core.pread, offset, length)
        )
        if got is None or life.lost:
            return
        want = life.history.expected(offset, length)
        for at in range(0, length, UNIT):
            assert got[at : at + UNIT] == want[at : at + UNIT], (
                f"{life}: sector {(offset + at) // SECTOR} + {(offset + at) % SECTOR}: "
                f"{got[at : at + 8].hex()}, not {want[at : at + 8].hex()}"
            )

    def read_cold(self) -> None:
        """From the store, and ahead of it."""
        self.evict()
        self.read_some()
        for node in self.nodes.values():
            if node.up and node not in self.acting:
                with self.step_of(node):
                    node.read_ahead()

    def flush(self) -> None:
        where = self.draw_volume()
        if where is None:
            return
        _, life, volume = where
        begin = self.platter.position()
        with contextlib.suppress(CoreError):
            self.request(where, "flush", volume.core.flush)
            if volume.fenced or life.lost:
                return
            life.flushes.append((begin, self.platter.position()))
            if life.flush == "store":
                self.model.observe()
                seen = self.model.named(life)
                content = seen.content if seen is not None else life.base  # nothing was ever written
                assert same(content, life.now()), f"{life}: flushed, and the store has something else"

    # -- the log's disk fails --------------------------------------------------------------------------

    def disk_stuck(self) -> None:
        """The log cannot be written to for a while, in which writers wait."""
        self.faults.stop_writes(self.rng.choice([errno.ENOSPC, errno.ENOSPC, errno.EIO]))
        self.note(f"  log writes fail: {max(self.faults.counts)}")
        try:
            self.choose(("write", "write_small", "write_unaligned", "zero", "write_through"))
        finally:
            self.faults.stop()

    def sync_fails(self) -> None:
        """A flush fails, and says so until the store has what may be lost."""
        where = self.draw_volume()
        if where is None:
            return
        _, life, volume = where
        if life.flush == "store":
            return
        if self.rng.random() < 0.7:
            self.change(where, *self.draw_range(life, SECTOR, 3 * SECTOR))
        self.faults.fail_syncs(self.rng.choice([SYNC, SYNC, DIR]))
        was_failed, life.sync_failed = life.sync_failed, True
        begin = self.platter.position()
        try:
            self.request(where, "flush, and syncs fail", volume.core.flush)
        except CoreError:
            return
        finally:
            self.faults.stop()
        if not (volume.fenced or life.lost):
            life.flushes.append((begin, self.platter.position()))
        life.sync_failed = was_failed

    def small_files_fail(self) -> None:
        """A verb, or an upload, meets a disk that takes no small files."""
        operation = self.rng.choice(["create", "write", "fsync", "rename"])
        self.faults.fail_small(operation, self.rng.choice([errno.ENOSPC, errno.EIO]))
        try:
            self.choose(self.FILING)
        finally:
            self.faults.stop()

    FILING: tuple[str, ...] = ()

    def choose(self, names: tuple[str, ...]) -> None:
        """Do one of these steps."""
        name = self.rng.choice(names)
        self.note(f"  {name}")
        getattr(self, name)()

    # -- uploads ---------------------------------------------------------------------------------------

    def background(self) -> None:
        """Whatever is due, on all nodes."""
        for node in self.nodes.values():
            if node.up and node not in self.acting:
                with self.step_of(node):
                    node.run_due()
                    node.read_ahead()

    def upload(self) -> None:
        """By its age, or as more log is needed."""
        where = self.draw_volume()
        if where is None:
            return
        node, life, volume = where
        urgent = self.rng.random() < 0.3
        self.note(f"  {life}: upload{' urgently' if urgent else ''}")
        node.host.scheduler.request(volume, seal=self.rng.random() < 0.8, urgent=urgent)
        with self.step_of(node):
            node.run_due(self.rng.choice([1, 8]))

    def drain(self) -> None:
        where = self.draw_volume()
        if where is not None:
            self.drain_now(where)

    def drain_now(self, where: Where) -> bool:
        """Whether it worked: then the store has all, and that outlasts the power."""
        node, life, _ = where
        begin, now = self.platter.position(), life.now()
        self.note(f"  {life}: drain")
        if not self.may_drain(where):
            return False
        if self.try_drain(node, life) is not None:
            return False
        self.drained(life, begin, now)
        return True

    def try_drain(self, node: SimNode, life: Life) -> GlideError | None:
        """The verb; what it raised."""
        with self.step_of(node):
            try:
                node.router.drain(life.name, 120.0)
            except GlideError as error:
                node.check_alive()
                self.note(f"  {life}: not drained: {error}")
                self.counts[f"drain {type(error).__name__}"] += 1
                return error
        node.check_alive()
        return None

    def may_drain(self, where: Where) -> bool:
        """Whether the store takes what this node has; if not, a drain must not say that it did."""
        return True

    def drained(self, life: Life, begin: int, now: dict[int, bytes]) -> None:
        """All that was acknowledged before ``begin``, which was ``now``, is in the store."""
        self.model.observe()
        if life.lost or life.cut_at is not None:  # what the power cut left was not its own to show until now
            return
        seen = self.model.named(life)
        assert seen is not None, f"{life}: drained to a store that does not know it"
        # Of a write under way it may have what is written already.
        maybe = {sector: version.content for sector, version in life.pending.items()}
        assert all(
            seen.content.get(sector, ZERO) in (now.get(sector, ZERO), maybe.get(sector))
            for sector in seen.content.keys() | now.keys()
        ), f"{life}: drained, and the store has something else"
        life.flushes.append((begin, self.platter.position()))
        life.sync_failed = False

    def seal(self) -> None:
        where = self.draw_volume()
        if where is not None:
            self.note(f"  {where[1]}: seal")
            where[2].core.seal()

    def retire(self) -> None:
        where = self.draw_volume()
        if where is None:
            return
        node, life, volume = where
        self.note(f"  {life}: retire")
        self.platter.settle()
        volume.retire_committed()
        self._crash_inside(node, "retire")

    def compact(self) -> None:
        where = self.draw_volume()
        if where is None:
            return
        node, life, volume = where
        self.note(f"  {life}: compact")
        with self.step_of(node), contextlib.suppress(Superseded):
            try:
                node.host.compactor.compact(volume, settle=self.rng.random() < 0.6)
            except Fenced as error:
                volume.fence(error.why)
        node.check_alive()

    def evict(self) -> None:
        for node in self.nodes.values():
            if node.up and node not in self.acting:
                node.engine.cache.evict_all()
                node.host.meta.indices.clear()
                node.host.meta.pages.clear()

    # -- time, and the store -----------------------------------------------------------------------------

    def pass_time(self) -> None:
        seconds = self.rng.choice([1.0, 20.0, 20.0, GRACE / 8, GRACE / 4, GRACE * 0.6, GRACE + 1.0])
        self.note(f"  {seconds:.0f} s pass")
        self.clock.sleep(seconds)

    def gc(self) -> None:
        if self.rng.random() < 0.2:
            self.arm("gc", "store", self.rng.randrange(30))
        self.collect()

    def gc_later(self) -> None:
        """A run, and another once the grace is over."""
        self.gc()
        self.clock.sleep(GRACE + 1.0)
        self.gc()

    def outage(self) -> None:
        self.plan.down_until = self.clock.now + self.rng.choice([1.0, 10.0, 60.0])
        self.note(f"  the store is down until {self.plan.down_until - self.clock.now:.0f} s from now")

    def store_gets_worse(self) -> None:
        """Other faults than before, or none."""
        rates = {kind: self.rng.choice([0.0, 0.0, 0.01, 0.05, 0.2]) for kind in KINDS}
        total = sum(rates.values())
        if total > MOST_FAULTS:
            rates = {kind: rate * MOST_FAULTS / total for kind, rate in rates.items()}
        if self.rng.random() < 0.3:
            rates = {}
        self.plan.rates = rates
        self.note(f"  the store's faults are now {rates}")
