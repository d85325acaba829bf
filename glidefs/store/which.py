"""Which store this is: an id in the store, compared before the store is believed or written to.

``store.json`` at the root is written once, when a store is first used. A host keeps the id of the store that
it works with. Where the object is absent or has another id, this is not that store now: a disk is not
mounted, a bucket or an endpoint is the wrong one. Then requests fail as if the store were away: nothing
is fenced, put or deleted, and exports serve what is resident.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from glidefs.errors import (
    CorruptObject,
    NotFound,
    PreconditionFailed,
    StoreError,
    StoreUnavailable,
    Throttled,
)
from glidefs.formats import identity
from glidefs.formats.identity import StoreIdentity
from glidefs.store.base import ObjectStore

log = logging.getLogger(__name__)

STORE_KEY = "store.json"
BETWEEN = 0.25
"""Seconds between two requests for it after trouble: a storm of errors does not double the requests.

Each time it costs those that must wait for the answer up to so long.
"""


class WhichStore:
    """The id of the store that is meant. ``expected``: 32 hex digits, None where none is known yet.

    ``bind`` is called with the id of a store that is used for the first time. ``_lock`` is held while the
    store is asked, so that one thread asks, and the others take its answer; ``verified`` is read without it.
    """

    def __init__(self, expected: str | None, bind: Callable[[str], None]) -> None:
        self.expected = expected
        self.verified = False
        """Whether the store that answers now was verified to be the one that is meant."""
        self._bind = bind
        self._lock = threading.Lock()
        self._begun = 0
        """Times that the store was asked."""
        self._good = 0
        """The last of them if it was answered as it should be, else 0."""
        self._good_at = 0.0
        self._doubts = 0

    def doubt(self, error: StoreError) -> None:
        """Trouble: another store may be in its place. One that asks for fewer requests is the same one."""
        if not isinstance(error, Throttled):
            self._doubts += 1  # one that is lost among others leaves another count all the same
            self.verified = False

    def ensure(self, store: ObjectStore, *, writes: bool, proven: bool = False) -> None:
        """Raise StoreUnavailable unless this is the store that is meant; the first write gives it an id.

        After trouble it is asked again, at most once in BETWEEN seconds; calls that come earlier wait. What
        is ``proven`` by a hash need not wait: it is right whichever store it comes from.
        """
        while not self.verified:
            with self._lock:
                if self.verified:
                    return
                wait = self._good_at + BETWEEN - time.monotonic() if self._good else 0.0
                if wait <= 0:
                    self._ask(store, create=writes)
                    return
            if proven:
                return
            time.sleep(wait)

    def check(self, store: ObjectStore) -> None:
        """The same, and ask the store in any case: before an absence is believed.

        What was asked from now on counts, whoever asked.
        """
        begun = self._begun
        with self._lock:
            if self._good > begun and self.verified:
                return
            self._ask(store, create=False)

    def _ask(self, store: ObjectStore, *, create: bool) -> None:
        self._begun += 1
        self._good, doubts = 0, self._doubts
        try:
            good = self._check(store, create=create)
        except BaseException:
            self.verified = False
            raise
        self.verified = good and doubts == self._doubts
        if good:
            self._good, self._good_at = self._begun, time.monotonic()

    def _check(self, store: ObjectStore, *, create: bool) -> bool:
        """Whether it says that it is the one; False if it need not say. Raises StoreUnavailable."""
        found = _read(store)
        if found is None and self.expected is not None:
            raise StoreUnavailable(
                f"{store.url} is not this host's store {self.expected}: it has no {STORE_KEY}; mount its "
                "disk, or correct the bucket or the endpoint"
            )
        if found is None:
            if not create:
                return False  # nothing was ever put here by anybody who knew of ids
            found = _create(store)
        if self.expected is None:
            self.expected = found.id
            self._bind(found.id)
        if found.id != self.expected:
            raise StoreUnavailable(
                f"{store.url} is store {found.id}, not this host's store {self.expected}; correct the url, "
                "the endpoint or what is mounted"
            )
        store.settle_on()
        return True


def _read(store: ObjectStore) -> StoreIdentity | None:
    try:
        data = store.get(STORE_KEY).data
    except NotFound:
        return None
    try:
        return identity.decode(STORE_KEY, data[: identity.MAX_FILE], StoreIdentity)
    except CorruptObject as error:
        raise StoreUnavailable(f"the store does not say which one it is: {error}", key=STORE_KEY) from error


def _create(store: ObjectStore) -> StoreIdentity:
    mine = StoreIdentity(id=identity.new_id(), created=int(time.time()))
    with contextlib.suppress(PreconditionFailed):  # somebody was faster, or the answer was lost: see which
        store.put(STORE_KEY, identity.encode(mine), if_none_match=True)
    found = _read(store)
    if found is None:
        raise StoreUnavailable("the store does not keep what is put", key=STORE_KEY)
    if found.id == mine.id:
        log.debug("%s is used for the first time; it is store %s", store.url, mine.id)
    return found
