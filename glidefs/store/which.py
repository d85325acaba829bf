"""Which store this is: an id in the store, compared before anything is believed of it or put into it.

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

from glidefs.errors import CorruptObject, NotFound, PreconditionFailed, StoreUnavailable
from glidefs.formats import identity
from glidefs.formats.identity import StoreIdentity
from glidefs.store.base import ObjectStore

log = logging.getLogger(__name__)

STORE_KEY = "store.json"


class WhichStore:
    """The id of the store that is meant. ``expected``: 32 hex digits, None where none is known yet.

    ``bind`` is called with the id of a store that is used for the first time. ``_lock`` is held while the
    store is asked, so that one thread asks; ``verified`` is read without it.
    """

    def __init__(self, expected: str | None, bind: Callable[[str], None]) -> None:
        self.expected = expected
        self.verified = False
        """Whether the store that answers now was seen to be the one that is meant."""
        self._bind = bind
        self._lock = threading.Lock()

    def doubt(self) -> None:
        """The store was away: another one may be in its place."""
        self.verified = False

    def ensure(self, store: ObjectStore, *, writes: bool) -> None:
        """Raise StoreUnavailable unless this is the store that is meant; the first write gives it an id."""
        if self.verified:
            return
        with self._lock:
            if not self.verified:
                self._check(store, create=writes)

    def check(self, store: ObjectStore) -> None:
        """The same, and ask the store in any case: before an absence is believed."""
        with self._lock:
            self.verified = False
            self._check(store, create=False)

    def _check(self, store: ObjectStore, *, create: bool) -> None:
        found = _read(store)
        if found is None and self.expected is not None:
            raise StoreUnavailable(
                f"{store.url} is not this host's store {self.expected}: it has no {STORE_KEY}; mount its "
                "disk, or correct the bucket or the endpoint"
            )
        if found is None:
            if not create:
                return  # nothing was ever put here by anybody who knew of ids
            found = _create(store)
        if self.expected is None:
            self.expected = found.id
            self._bind(found.id)
        if found.id != self.expected:
            raise StoreUnavailable(
                f"{store.url} is store {found.id}, not this host's store {self.expected}; correct the url, "
                "the endpoint or what is mounted"
            )
        self.verified = True
        store.settle_on()


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
