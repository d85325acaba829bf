"""One seed, one history: guests, uploads, compaction, gc, moves and faults on two nodes over one store.

Everything that happens is drawn from ``random.Random(seed)`` and runs on one thread, one thing after
another; ``sim_clock.py`` says how time and chance of the product come from the seed, too, and
``sim_node.py`` what becomes of its threads. So a seed is a failure that can be looked at again and again:
``python -m tests.sim.run SEED``.
"""

from __future__ import annotations

from faulty_store import KINDS, Crash
from handoff_step import step_handoff
from sim_identity import IDENTITY_WEIGHTS, Identity
from sim_node import GRACE, SimNode
from sim_world import Result

from glidefs.errors import GlideError
from glidefs.manifest import lease

WEIGHTS = {
    "write": 12,
    "write_small": 8,
    "write_unaligned": 6,
    "write_through": 4,
    "zero": 4,
    "discard": 2,
    "read_some": 6,
    "read_cold": 4,
    "flush": 6,
    "disk_stuck": 2,
    "sync_fails": 2,
    "small_files_fail": 2,
    "background": 8,
    "upload": 8,
    "drain": 4,
    "seal": 2,
    "retire": 3,
    "compact": 4,
    "evict": 2,
    "pass_time": 4,
    "gc": 2,
    "gc_later": 2,
    "outage": 1,
    "store_gets_worse": 2,
    "create": 3,
    "fork": 4,
    "fork_and_drop": 3,
    "remove": 1,
    "undelete": 2,
    "detach": 2,
    "attach": 4,
    "take_over": 2,
    "use_stale": 3,
    "watch": 2,
    "snapshot": 2,
    "tag": 1,
    "make_base": 1,
    "delete_copy": 1,
    "restart": 1,
    "handoff": 3,
    "look_after": 2,
    "crash_now": 3,
    "crash_soon": 6,
    "lose_disk": 0.3,
}
"""How often each step is chosen; every seed has a taste of its own."""

STEPS = (30, 100)
TOLD = 400
"""Lines of the trace that a failure shows."""
MEANWHILE = (
    "gc",
    "gc_later",
    "pass_time",
    "background",
    "write_small",
    "drain",
    "take_over",
    "flush",
    "compact",
    "outage",
)
"""What may happen on the other node while one waits for the store."""
MEANWHILE_GC = (
    "upload",
    "drain",
    "fork",
    "snapshot",
    "tag",
    "remove",
    "delete_copy",
    "compact",
    "take_over",
    "detach",
)
MEANWHILE_GC += ("background", "pass_time", "crash_now", "other_gc")
"""What may happen while gc waits for it."""


class Simulation(Identity):
    """``run`` does it all. An AssertionError says what was not as it must be."""

    depth = 0
    """How many steps are under way, one while another waits."""

    FILING = ("create", "fork", "attach", "detach", "drain", "upload", "remove", "snapshot")

    def run(self) -> Result:
        rng = self.rng
        weights = WEIGHTS | (IDENTITY_WEIGHTS if self.identity else {})
        self.weights = {name: weight * rng.choice([0, 0.5, 1, 1, 2]) for name, weight in weights.items()}
        self.weights["write"] = max(self.weights["write"], 6)
        if rng.random() < 0.8:
            self.plan.rates = {kind: rng.choice([0.0, 0.01, 0.04]) for kind in KINDS}
        self.crash_rate = rng.choice([0.0, 0.0, 0.02, 0.05])
        self.meanwhile_rate = rng.choice([0.0, 0.0, 0.002, 0.01])
        self.meanwhile_gc_rate = rng.choice([0.0, 0.02, 0.1])
        self.name_nodes()
        for node in self.nodes.values():
            self.boot(node)
        self.step("create")
        for _ in range(rng.randint(*STEPS)):
            for node in list(self.nodes.values()):
                if not node.up and rng.random() < 0.5:
                    self.guarded(lambda node=node: self.start(node))
            self.step(self.draw_step())
        self.settle()
        return self.result()

    def draw_step(self) -> str:
        if not self.usable() and self.rng.random() < 0.6:
            return self.rng.choice(["create", "attach", "attach", "fork", "look_after"])
        return self.rng.choices(list(self.weights), list(self.weights.values()))[0]

    def step(self, name: str) -> None:
        self.note(name)
        self.counts[f"step {name}"] += 1
        self.guarded(self.handoff if name == "handoff" else getattr(self, name))

    def handoff(self) -> None:
        step_handoff(self)

    def start(self, node: SimNode) -> None:
        with self.step_of(node):
            self.boot(node)

    def guarded(self, action) -> None:
        """Do something that may end with a crash, and look at what it did."""
        self.crash_at = None
        self.depth += 1
        try:
            if self.depth == 1:
                self.check_late()
            action()
        except Crash:
            self.faults.stop()
        except (GlideError, OSError) as error:
            self.note(f"  {type(error).__name__}: {error}")
        finally:
            self.depth -= 1
        for node in self.nodes.values():
            if node.dead and node not in self.acting:
                self.crash(node, self.draw_keep(), self.crash_at)
        self.model.observe()
        self.check_fenced()
        self.check_doors()
        assert not self.errors.unexpected, self.errors.unexpected

    def meanwhile(self, node: SimNode | None) -> None:
        """Sometimes somebody else does something while a node, or gc, waits for an answer."""
        rate = self.meanwhile_rate if node is not None else self.meanwhile_gc_rate
        if self.depth != 1 or self.rng.random() >= rate:
            return
        name = self.rng.choice(MEANWHILE if node is not None else MEANWHILE_GC)
        self.note(f"  meanwhile {name}")
        before, self.crash_at = self.crash_at, None
        self.guarded(getattr(self, name))
        self.crash_at = before

    def other_gc(self) -> None:
        """Another run of gc beside the one under way."""
        self.collect("other gc")

    # -- the end -----------------------------------------------------------------------------------------

    def settle(self) -> None:
        """No more faults: all is there, everything works, and gc leaves what is named and nothing else."""
        self.note("settle")
        self.plan.rates, self.plan.down_until, self.crash_rate = {}, 0.0, 0.0
        self.meanwhile_rate = self.meanwhile_gc_rate = 0.0
        self._armed.clear()
        self.doors_back()
        self.clock.sleep(self.plan.lag + max(60.0, lease.DOOMED_FOR))
        for node in self.nodes.values():
            if not node.up:
                self.boot(node)
            with self.step_of(node):
                node.look_after()
            self.check_open(node)
        self.guarded(self.background)
        self.end_rollbacks()
        for where in self.usable():
            assert self.drain_now(where) or where[1].lost, f"{where[1]} cannot be drained"
        self.check_late()
        self.check_fenced()
        self.check_all_know()
        self.check_everything()
        for _ in range(3):
            self.clock.sleep(GRACE + 1.0)
            self.collect()
        self.model.stored.check_named()
        left = self.model.stored.objects() - self.model.stored.named()
        assert not left, f"gc left {self.model.stored.ages(left)}"
        self.check_everything()

    def check_everything(self) -> None:
        """Every volume by its node from the store, and every root by the formats alone."""
        self.evict()
        for node, life, volume in self.usable():
            volume.retire_committed()
            found = self.read(node, life, volume)
            wrong = [sector for sector, content in found.items() if content != life.history.now(sector)]
            assert not wrong, f"{life}: sectors {wrong} are wrong at the end"
            volume.core.flush()
        for key, seen in self.model.roots.items():
            content = self.model.stored.stored(key, list(seen.content))
            assert content == seen.content, f"{key} is not what it was"


def simulate(seed: int, *, keep_trace: bool = False, identity: bool = False) -> Result:
    """Run one seed. Raises AssertionError, with the trace so far in a note if it is kept.

    ``identity``: with clones, and stores that are swapped or go back; other histories than without.
    """
    with Simulation(seed, keep_trace, identity=identity) as sim:
        try:
            return sim.run()
        except BaseException as error:
            again = f"python -m tests.sim.run {seed}{' --identity' if identity else ''}"
            error.add_note("\n".join([*sim.trace[-TOLD:], again]))
            raise
