"""Thread pools of the verbs, one per thing they wait for: a verb that waits for the store delays no other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from glidefs.errors import Refused


class Pool:
    """At most ``places`` calls at a time. The next one waits for a place, or is refused (``refuse``)."""

    def __init__(self, places: int, *, refuse: bool = False) -> None:
        self.places = places
        self._refuse = refuse
        self._limiter = anyio.CapacityLimiter(places)
        self.busy = 0
        """Calls under way, and those that wait for a place. For the event loop's thread only."""

    async def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run a call on a thread. Raises Refused where all places are taken."""
        if self._refuse and self.busy >= self.places:
            raise Refused(f"{self.busy} verbs wait already; try again when some of them have ended")
        self.busy += 1
        try:
            return await anyio.to_thread.run_sync(partial(function, *args, **options), limiter=self._limiter)
        finally:
            self.busy -= 1


class Pools:
    """One pool for each kind of wait.

    ``looks`` reads memory. ``local`` changes what is here, and gives the store two seconds at most; ``forks``
    seldom asks it. ``stores`` waits for the store as long as a verb has patience, which is bounded.
    ``waits`` has no bound but what its callers set: a drain lasts as long as an outage. A handoff is alone.
    """

    def __init__(self) -> None:
        self.looks = Pool(4)
        self.local = Pool(16)
        self.forks = Pool(16)
        self.stores = Pool(32)
        self.waits = Pool(128, refuse=True)
        self.handoffs = Pool(2)
