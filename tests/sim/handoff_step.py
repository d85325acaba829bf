"""Handoff as a step of the simulation: what it amounts to for the volumes of a node.

The predecessor comes to rest: no commit and no retire from there on. It closes its logs without a sync, and
the successor opens the same logs under the same ids in the same state directory, and appends to new segments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fork_rig import PREFIX
from sim_model import must
from sim_node import SimNode

from glidefs.manifest import local
from glidefs.names import manifest_key

if TYPE_CHECKING:
    from simulation import Simulation

VARIANTS = ("done", "done", "done", "aborted", "revived", "predecessor dies", "successor dies")


class CutOver(NamedTuple):
    """What the predecessor says of a volume at cut-over: the root's ETag, lowest segment, last segment.

    ``copied``: whether the local copy of the root is that root.
    """

    etag: str | None
    copied: bool
    first_seq: int
    last_seq: int


def step_handoff(sim: Simulation) -> None:
    """A node hands over to a new process of itself, which works, is given up, or ends with a death.

    While the predecessor rests, guests go on. *aborted* is before cut-over, in place. *revived* is after it:
    the successor is gone, and the predecessor opens everything again, which is the ordinary recovery.
    """
    node = sim.draw_node()
    if node is None:
        return
    variant = sim.rng.choice(VARIANTS)
    sim.note(f"  {node.name}: handoff, {variant}")
    sim.counts[f"handoff {variant}"] += 1
    node.host.pause(20.0)
    sim.model.observe()
    try:
        _guests_go_on(sim, node)
        cut = _cut_over(sim, node)
    finally:
        if node.up and not node.dead and (variant == "aborted"):
            node.host.resume()
    if variant == "aborted":
        return
    if variant == "predecessor dies":
        sim.crash(node, sim.draw_keep())
        return
    node.stop()
    sim.mark_unchecked(node)
    with sim.step_of(node):
        sim.boot(node)
        if variant in ("successor dies", "revived"):
            node.kill(variant)
            sim.crash(node, sim.draw_keep() if variant == "successor dies" else None)
            if variant == "successor dies":
                return
            sim.boot(node)
    _check(sim, node, cut)


def _guests_go_on(sim: Simulation, node: SimNode) -> None:
    """What guests do while nothing is uploaded; not so much that the log is full."""
    stats = node.engine.stats()
    if stats.log_bytes > stats.log_limit // 4 or stats.map_bytes > stats.map_budget // 4:
        return
    for where in sim.usable():
        if where[0] is node and where[1].flush == "local" and sim.rng.random() < 0.5:
            sim.change(where, *sim.draw_range(where[1], 512, 4 * 4096), fua=sim.rng.random() < 0.2)


def _cut_over(sim: Simulation, node: SimNode) -> dict[bytes, CutOver]:
    """What the predecessor says of its volumes; nothing was committed since it was told to rest."""
    assert not [one for one in sim.store.log if one.who == node.name], "a commit during a handoff"
    found = {}
    for life, volume in sim.entries(node):
        info = volume.core.info()
        saved = local.load(node.home / "state", life.volume_id, manifest_key(PREFIX, life.name))
        copied = saved is not None and saved[1] == volume.etag
        found[life.log_id] = CutOver(volume.etag, copied, info.first_seq, info.last_seq)
    return found


def _check(sim: Simulation, node: SimNode, cut: dict[bytes, CutOver]) -> None:
    """The successor has what the predecessor had, and writes elsewhere."""
    for life, volume in sim.entries(node):
        was = cut.get(life.log_id)
        if was is None or life.lost or volume.fenced:
            continue
        info = volume.core.info()
        # A local copy that could not be written (it is tried again) leaves the successor an older root; after
        # a failed sync it takes the store's, of a commit whose answer was lost perhaps.
        stored = sim.store.etag_of(manifest_key(PREFIX, life.name))
        may = (was.etag, stored) if was.copied else (volume.etag,)
        must(volume.etag in may, f"{life}: etag {volume.etag} after a handoff, before it {was.etag}")
        must(max(info.last_seq, info.committed_seq) >= was.last_seq, f"{life}: {info} after {was}")
        sim.change((node, life, volume), *sim.draw_range(life, 4096, 4096))
        if not (life.lost or volume.fenced):
            last = volume.core.info().last_seq
            must(last > was.last_seq, f"{life}: segment {last} is written on after a handoff")
