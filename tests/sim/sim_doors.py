"""The way of each node to the store: whose a request is, and which store is behind it.

For a while there may be another one: an empty directory where its disk was mounted, or a store with another
id, with volumes of the same names. The first request after a change meets a connection that was reset.
"""

from __future__ import annotations

from sim_clock import Clock
from sim_model import SimStore

from glidefs.errors import StoreUnavailable
from glidefs.store.base import Body, Buffer, Keys, ListPage, Object, ObjectInfo, ObjectStore


class OtherStore(SimStore):
    """A store that is not that of any node here. ``touched`` is what somebody did to it."""

    def __init__(self, clock: Clock, objects: dict[str, tuple[bytes, ObjectInfo]]) -> None:
        super().__init__(clock)
        self._objects = dict(objects)
        self.touched: list[str] = []

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        self.touched.append(f"{self.by} put {key}")
        return super().put(key, data, if_match=if_match, if_none_match=if_none_match)

    def delete(self, key: str) -> None:
        self.touched.append(f"{self.by} deleted {key}")
        super().delete(key)


class Door(ObjectStore):
    """``store``, or for a while another one, as ``who`` asks it."""

    def __init__(self, who: str, store: SimStore, clock: Clock) -> None:
        self.url = store.url
        self._who = who
        self._store = store
        self._clock = clock
        self._other: OtherStore | None = None
        self._until = 0.0
        self._reset = False

    def swap(self, other: OtherStore, until: float) -> None:
        """From now on another store is there."""
        self._other, self._until, self._reset = other, until, True

    def back(self) -> None:
        """The store that is meant is there again."""
        self._reset |= self._other is not None
        self._other = None

    @property
    def swapped(self) -> bool:
        """Whether another store is there."""
        return self._other is not None and self._clock.now < self._until

    def check(self) -> None:
        """Nobody put anything into a store that is not his."""
        assert self._other is None or not self._other.touched, f"another store: {self._other.touched}"

    def enter(self) -> None:
        """A request is made. Raises StoreUnavailable."""
        if self._until <= self._clock.now:
            self.back()
        if self._reset:
            self._reset = False
            raise StoreUnavailable("the connection was reset")

    def _there(self) -> SimStore:
        store = self._store if self._other is None else self._other
        store.by = self._who
        return store

    def get(self, key: str) -> Object:
        return self._there().get(key)

    def get_range(self, key: str, offset: int, length: int, into: memoryview | None = None) -> Buffer:
        return self._there().get_range(key, offset, length, into)

    def get_suffix(self, key: str, length: int) -> tuple[bytes, int]:
        return self._there().get_suffix(key, length)

    def head(self, key: str) -> ObjectInfo:
        return self._there().head(key)

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        return self._there().put(key, data, if_match=if_match, if_none_match=if_none_match)

    def delete(self, key: str) -> None:
        self._there().delete(key)

    def list_page(self, prefix: str, token: str = "") -> ListPage:
        return self._there().list_page(prefix, token)

    def list_dirs(self, prefix: str) -> Keys:
        return self._there().list_dirs(prefix)
