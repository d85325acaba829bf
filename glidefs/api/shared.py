"""One answer for all who ask at about the same time: the text of a scrape is work, and several may scrape."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

KEPT = 1.0
"""Seconds from the beginning of the work: nobody is given an older answer, and then its memory goes."""


class Shared:
    """What ``make`` returns, for whoever asks within :data:`KEPT`. For the event loop's thread only."""

    def __init__(self, make: Callable[[], Awaitable[bytes]]) -> None:
        self._make = make
        self._task: asyncio.Task[bytes] | None = None

    async def get(self, *, fresh: bool = False) -> bytes:
        """The answer: one that is there or being made, else a new one (with ``fresh`` always). Raises."""
        task = self._task
        if task is None or fresh:
            task = self._task = asyncio.create_task(self._made())
            asyncio.get_running_loop().call_later(KEPT, self._forget, task)
        return await asyncio.shield(task)  # a client that leaves does not end it for others

    async def _made(self) -> bytes:
        try:
            return await self._make()
        except BaseException:
            self.changed()  # the next one tries again
            raise

    def changed(self) -> None:
        """From now on, give nobody what was made or is being made."""
        self._task = None

    def _forget(self, task: asyncio.Task[bytes]) -> None:
        if self._task is task:
            self._task = None
