"""Who is next, where many volumes wait: the one with the least under way.

No volume takes more than its share while others wait: each free place goes to the volume that has the
fewest, and a part of all places is kept for those that have none.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Generic, TypeVar

T = TypeVar("T")

_KEPT = 8
"""One place in so many is kept for volumes that have nothing under way."""


class Shares(Generic[T]):
    """Items that wait, by volume, and how many places each volume has of ``places``. Not thread-safe."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.taken: Counter[int] = Counter()
        """Places by volume."""
        self.total = 0
        """Places that are taken."""
        self._waiting: dict[int, deque[T]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __len__(self) -> int:
        return sum(len(items) for items in self._waiting.values())

    def put(self, volume: int, item: T) -> None:
        """One more that waits."""
        items = self._waiting.get(volume)
        if items is None:
            items = self._waiting[volume] = deque()
        items.append(item)

    def take(self, most: int = 1 << 30) -> tuple[int, list[T]] | None:
        """A volume and the items of it, at most so many, whose turn it is, in their order; None: nobody's.

        They do not have their places yet: see :meth:`enter`.
        """
        if self._waiting:
            volume = min(self._waiting, key=self.taken.__getitem__)
            mine = self.taken[volume]
            free = self.places - self.total
            if mine:
                free -= self.places // _KEPT
            if free <= 0:
                return None
            # What is free, shared with the others that wait; those with more are behind in any case.
            share = max(1, free // len(self._waiting))
            items = self._waiting[volume]
            found = [items.popleft() for _ in range(min(share, len(items), most))]
            if not items:
                del self._waiting[volume]
            return volume, found
        return None

    def enter(self, volume: int, count: int = 1) -> None:
        """The volume takes places."""
        self.taken[volume] += count
        self.total += count

    def leave(self, volume: int, count: int = 1) -> None:
        """It gives them back."""
        self.total -= count
        self.taken[volume] -= count
        if not self.taken[volume]:
            del self.taken[volume]

    def forget(self, volume: int) -> None:
        """Nothing of the volume waits any more."""
        self._waiting.pop(volume, None)
