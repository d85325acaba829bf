"""A seed alone, then beside what another test left: ``python -m tests.sim.left_behind SEED``.

An engine, a thread that draws, sleeps, asks for the time and writes, the real ones; and disk space that a
host keeps in reserve. Status 0: no change.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import tests.sim.run  # noqa: F401  where the modules of the simulation are
from glidefs.core.check import CoreError
from glidefs.formats import reserve
from glidefs.store import resilient

TURNS = 10
"""Of the thread, at least."""


class LeftBehind(threading.Thread):
    """Writes to ``volume`` (a Vol of core_rig), and renews ``kept``, until ``ended`` is set."""

    def __init__(self, volume: Any, kept: reserve.Reserve) -> None:
        super().__init__()
        self.volume = volume
        self.kept = kept
        self.ended = threading.Event()
        self.waited: list[float] = []

    def run(self) -> None:
        while not self.ended.is_set():
            self.kept.renew()
            random.uniform(0, 1)
            secrets.token_hex(4)
            began = time.monotonic()
            resilient.time.sleep(0.001)
            self.waited.append(time.monotonic() - began)
            with contextlib.suppress(CoreError):  # the simulation's disk faults are those of the process
                self.volume.core.pwrite(0, bytes(4096))
                self.volume.commit()
            assert abs(resilient.time.time() - time.time()) < 60


def main() -> int:
    from core_rig import rigs
    from sim_world import MEMORY
    from simulation import simulate

    seed = int(sys.argv[1])
    alone = simulate(seed).digest
    with tempfile.TemporaryDirectory(dir=MEMORY) as place, rigs(Path(place)) as make:
        thread = LeftBehind(make().vol(), reserve.register(Path(place)))
        thread.start()
        try:
            beside = {simulate(seed).digest}
            while thread.is_alive() and len(thread.waited) <= TURNS:  # it had no turn
                beside.add(simulate(seed).digest)
        finally:
            thread.ended.set()
            thread.join()
    print(f"alone {alone}, beside it {beside}, {len(thread.waited)} turns")
    return int(beside != {alone} or len(thread.waited) <= TURNS or min(thread.waited) < 0.001)


if __name__ == "__main__":
    raise SystemExit(main())
