"""Marking: everything that was listed, minus what roots and checkpoints of the prefix refer to.

Memory: ids as 16 bytes, in one dictionary per kind. There is no set of what is named: an id that a root
names leaves the dictionary of candidates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar

from glidefs import names
from glidefs.errors import CorruptObject, GcRefused, InvalidName, NewerFormat, NotFound
from glidefs.formats.blessing import decode_blessing
from glidefs.formats.gc_state import FirstSeen
from glidefs.formats.manifest import Page, Root, decode_page, decode_root
from glidefs.formats.pack import ID_SIZE
from glidefs.store.base import ObjectInfo, ObjectStore
from glidefs.store.checked import fetch_checked, get_checked

THREADS = 8
"""Requests at a time."""
MIN_LOOKS = 2
MAX_LOOKS = 5
"""Listings of the roots of a run before it decides. In a busy prefix every one shows something new."""

T = TypeVar("T")
R = TypeVar("R")
Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done, objects done, and objects in all (0: not known)."""


def in_parallel(pool: Executor, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The results in order, of a bounded number of calls at a time; the first error ends it."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 4 * THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class Candidates:
    """The objects of one kind that were listed, and have not been found in a root so far."""

    __slots__ = ("key", "listed", "listed_bytes", "newborn", "place", "seen", "sizes", "strays", "young")

    def __init__(self, place: str, key: Callable[[str], str], seen: FirstSeen) -> None:
        self.place = place
        self.key = key
        """The store key of an id in hex."""
        self.seen = seen
        """What earlier runs saw without a root, and since when."""
        self.sizes: dict[bytes, int] = {}
        """Bytes by id, of those that no root names so far."""
        self.young: set[bytes] = set()
        """Those younger than the grace: not to be deleted."""
        self.newborn: set[bytes] = set()
        """Those younger than half of it: an upload may be about to commit them."""
        self.strays = 0
        self.listed = 0
        self.listed_bytes = 0

    def fill(self, infos: Iterable[ObjectInfo], now: float, grace: float) -> Iterator[int]:
        """List them, by their age at ``now``. Yields how many there are."""
        for info in infos:
            id_ = self._id(info.key)
            if id_ is None:
                self.strays += 1
                continue
            self.sizes[id_] = info.size
            if info.last_modified > now - grace:
                self.young.add(id_)
            if info.last_modified >= now - grace / 2:
                self.newborn.add(id_)
            yield len(self.sizes)
        self.listed = len(self.sizes)
        self.listed_bytes = sum(self.sizes.values())

    def _id(self, key: str) -> bytes | None:
        try:
            id_hex = names.check_id(key[-2 * ID_SIZE :])
        except InvalidName:
            return None
        return bytes.fromhex(id_hex) if self.key(id_hex) == key else None


class Named(NamedTuple):
    """What a version of a root or checkpoint names, without the packs of pages that were read before."""

    info: ObjectInfo
    etag: str
    root: Root | None
    packs: set[bytes]
    pages: set[bytes]


class Tombstone(NamedTuple):
    """The root of a removed base, and when it was put (unix seconds, by the store's clock)."""

    root: Root
    etag: str
    last_modified: float


class Checkpoint(NamedTuple):
    """The checkpoint of a bless as the last listing had it. ``is_done``: the base is there."""

    base: str
    info: ObjectInfo
    is_done: bool


class _PageGone(Exception):
    def __init__(self, key: str) -> None:
        self.key = key


class Marker:
    """Reads the roots and checkpoints of a prefix and takes what they name out of the candidates."""

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        pool: Executor,
        packs: Candidates,
        pages: Candidates,
        tell: Progress,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._pool = pool
        self._packs = packs
        self._pages = pages
        self._tell = tell
        self._read_etags: dict[str, str] = {}
        # Only this thread adds, what is in it has been marked: the pool may look without a lock.
        self._read_pages: set[bytes] = set()
        self.roots = 0
        """Roots of the last listing."""
        self.tombstones: dict[str, Tombstone] = {}
        """Of removed bases and volumes, by the key of their manifest."""
        self.checkpoints: list[Checkpoint] = []
        """Those of the last listing."""
        self.pins: list[ObjectInfo] = []
        """Those of the last listing: roots too."""
        self.damaged: set[str] = set()
        """Keys of checkpoints that cannot be decoded. A bless begins anew there, so they name nothing."""

    def mark(self) -> None:
        """Look at the roots until a listing shows nothing new."""
        for looks in range(1, MAX_LOOKS + 1):
            fresh = self.look()
            if looks >= MIN_LOOKS and not fresh:
                return

    def look(self) -> int:
        """List all roots and mark from those that are new or have changed. Returns how many had."""
        listed = {info.key: info for info in self._list() if self._names_packs(info.key)}
        self.checkpoints = [
            Checkpoint(key.split("/")[-2], info, _manifest_beside(key) in listed)
            for key, info in listed.items()
            if _is_checkpoint(key)
        ]
        pins = names.pins_prefix(self._prefix)
        self.pins = [info for key, info in listed.items() if key.startswith(pins)]
        self.roots = len(listed) - len(self.checkpoints)
        fresh = [info for info in listed.values() if self._read_etags.get(info.key) != info.etag]
        for done, named in enumerate(in_parallel(self._pool, self._read, fresh), 1):
            self._tell("reading roots", done, len(fresh))
            if named is not None:
                self._mark(named)
        return len(fresh)

    def _list(self) -> Iterator[ObjectInfo]:
        for place in (names.volumes_prefix, names.bases_prefix, names.tags_prefix):
            yield from self._store.list(place(self._prefix))

    def _names_packs(self, key: str) -> bool:
        match key.removeprefix(f"{self._prefix}/").split("/"):
            case ["volumes", _, "manifest"] | ["volumes", _, "snapshots", _]:
                return True
            case ["bases", _, "manifest" | "blessing"] | ["tags", _]:
                return True
            case ["bases", _, "hot-set"]:
                return False
        raise GcRefused(
            self._prefix,
            f"{key} is not known to this version and may name packs; "
            "run gc of the newest version in use, or delete the object",
        )

    def _read(self, info: ObjectInfo) -> Named | None:
        """What a root or checkpoint names now; None if it is gone, which it may be at any time."""
        missing: set[str] = set()
        while True:
            try:
                found = self._store.get(info.key)
            except NotFound:
                return None
            if _is_checkpoint(info.key):
                return Named(info, found.etag, None, self._of_checkpoint(info.key, found.data), set())
            try:
                root = decode_root(info.key, found.data)
            except CorruptObject:
                root, found = get_checked(self._store, info.key, decode_root)
            try:
                packs, pages = self._contents(root)
            except _PageGone as gone:
                # A commit may have replaced page and root in between, but not if the root as it is
                # now names the page.
                if gone.key in missing:
                    raise CorruptObject(gone.key, 0, f"not in the store, and {info.key} names it") from None
                missing.add(gone.key)
                continue
            return Named(info, found.etag, root, packs, pages)

    def _of_checkpoint(self, key: str, data: bytes) -> set[bytes]:
        try:
            return {pack.ref.id for pack in decode_blessing(key, data).packs}
        except NewerFormat:
            raise
        except CorruptObject:
            self.damaged.add(key)
            return set()

    def _contents(self, root: Root) -> tuple[set[bytes], set[bytes]]:
        packs: set[bytes] = set()
        pages = {page_id for page_id in root.page_ids if page_id}
        if root.inline_page is not None:
            packs.update(ref.id for ref in root.inline_page.packs)
        for page_id in sorted(pages - self._read_pages):  # in an order that tests can repeat
            key = self._pages.key(page_id.hex())
            page = fetch_checked(self._store, key, partial(self._read_page, page_id))
            packs.update(ref.id for ref in page.packs)
        return packs, pages

    def _read_page(self, page_id: bytes) -> Page:
        key = self._pages.key(page_id.hex())
        try:
            return decode_page(key, self._store.get(key).data, page_id)
        except NotFound:
            raise _PageGone(key) from None

    def _mark(self, named: Named) -> None:
        for id_ in named.packs:
            self._packs.sizes.pop(id_, None)
        for id_ in named.pages:
            self._pages.sizes.pop(id_, None)
        self._read_pages |= named.pages
        key = named.info.key
        self._read_etags[key] = named.etag
        self.tombstones.pop(key, None)
        # Another ETag than the listing's: the time of this version is not known.
        if named.root is not None and named.root.removed_at and named.etag == named.info.etag:
            self.tombstones[key] = Tombstone(named.root, named.etag, named.info.last_modified)


def _is_checkpoint(key: str) -> bool:
    """Is a key that names packs that of a checkpoint? (A volume or tag may bear that name.)"""
    return key.split("/")[1] == "bases" and key.endswith("/blessing")


def _manifest_beside(key: str) -> str:
    return key.removesuffix("blessing") + "manifest"
