"""The one committer of a volume: changed pages, then the root, then the local copy.

Everything that changes a manifest (uploads, compaction, resize, the first put of a fork) is a
:class:`Change` and goes through :meth:`Committer.commit`, one at a time. Packs are appended, dropped or
replaced, never changed in place.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from glidefs.core.gather import Gather
from glidefs.errors import CorruptObject, Fenced, GlideError, NotFound
from glidefs.formats.manifest import (
    PAGE_CHUNKS,
    PackRef,
    Page,
    Root,
    chunk_count,
    decode_root,
    encode_page,
    page_count,
    page_id,
)
from glidefs.formats.pack import ID_SIZE
from glidefs.manifest import lease, local
from glidefs.manifest.cache import MetaCache
from glidefs.manifest.log_digest import LogDigest
from glidefs.manifest.view import Manifest
from glidefs.names import manifest_key, page_key
from glidefs.store.base import ObjectStore
from glidefs.store.checked import get_checked

log = logging.getLogger(__name__)

T = TypeVar("T")


class Append(NamedTuple):
    """A new pack and the chunks that it holds blocks of; it becomes the newest in each."""

    ref: PackRef
    chunks: tuple[int, ...]


class Replace(NamedTuple):
    """In ``chunk`` the packs ``old`` (ids, oldest first), where they follow each other, become ``new``."""

    chunk: int
    old: tuple[bytes, ...]
    new: tuple[PackRef, ...]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What a commit does to a manifest, in this order: ``drops``, ``replaces``, ``appends``.

    ``drops`` are chunks that were overwritten or zeroed whole. ``size``, ``last_segment`` and ``transport``
    are None where they stay.
    """

    drops: frozenset[int] = frozenset()
    replaces: tuple[Replace, ...] = ()
    appends: tuple[Append, ...] = ()
    size: int | None = None
    last_segment: int | None = None
    transport: str | None = None


class Edited(NamedTuple):
    """The new root, still without ids of ``pages``, and the new pages by number."""

    root: Root
    pages: dict[int, Page]


class Superseded(GlideError):
    """The store had a newer root of ours, which is now in use: plan again on top of it."""

    temporary = True


class Committer:
    """The root of one volume and the right to replace it.

    ``_lock`` is held over a whole commit and guards all state; readers take ``root``, which is
    frozen, without it. ``on_change`` is called under the lock after the root was replaced, before
    anybody may retire what it includes. ``gather(first, last)`` replays segments of the log.
    """

    __slots__ = (
        "_gather",
        "_key",
        "_lock",
        "_log",
        "_meta",
        "_on_change",
        "_prefix",
        "_state_dir",
        "_tried",
        "_unsaved",
        "adoptions",
        "copy_lags",
        "etag",
        "known_segment",
        "last_contact",
        "local_segment",
        "root",
    )

    def __init__(
        self,
        root: Root,
        etag: str | None,
        *,
        prefix: str,
        meta: MetaCache,
        state_dir: Path,
        on_change: Callable[[], None],
        gather: Callable[[int, int], Gather],
    ) -> None:
        self.root = root
        self.etag = etag
        self.adoptions = 0
        """How often a root came from the store: plans made before are void."""
        self.last_contact = time.monotonic()
        """When the store was known to have this root; -inf for a local copy that was not compared since."""
        self.known_segment = root.last_segment
        """The last segment that the store may have from this host: replayed here, or committed since."""
        self.local_segment = 0
        """The last segment that the durable local copy includes."""
        self.copy_lags = False
        """Whether the local copy is not of the root in use, because it could not be written."""
        self._unsaved: dict[bytes, bytes] = {}
        self._tried: tuple[bytes, ...] = (root.nonce, *local.load_tried(state_dir, root.volume_id))
        self._prefix = prefix
        self._key = manifest_key(prefix, root.name)
        self._meta = meta
        self._state_dir = state_dir
        self._on_change = on_change
        self._lock = threading.Lock()
        self._gather = gather
        self._log: LogDigest | None = None  # rarely asked for

    @property
    def tried(self) -> tuple[bytes, ...]:
        """The nonces of roots that this host put and has not heard of: evidence that a root is its own."""
        return self._tried

    @property
    def published(self) -> bool:
        """Whether the store has had a root of this volume."""
        return self.etag is not None

    @property
    def confirmed(self) -> bool:
        """False for a local copy that may be older than the root of ours in the store."""
        return self.etag is None or self.last_contact != -inf

    def doubt(self) -> None:
        """The root is a local copy: a crash may have come between a commit and its copy."""
        self.last_contact = -inf

    def manifest(self, store: ObjectStore) -> Manifest:
        """The manifest in use now."""
        root = self.root
        local_pages = local.page_dir(self._state_dir, root.volume_id) if root.inline_page is None else None
        return Manifest(root, self._prefix, self._meta, store, local_pages)

    def save_local(self, copy: local.LocalCopy = local.LocalCopy.UNKNOWN) -> None:
        """Make the local copy durable as it is now; for a volume that is being opened.

        One that the store does not know yet has its root in its record, and needs no copy before.
        Raises OSError.
        """
        with self._lock:
            if self.etag is None and not local.volume_dir(self._state_dir, self.root.volume_id).exists():
                self.local_segment = self.root.last_segment
                return
            if copy is local.LocalCopy.UNKNOWN and not self._is_saved():
                local.save(self._state_dir, self.root, self._key, self.etag)
            elif copy is not local.LocalCopy.ENOUGH:
                local.sync(self._state_dir, self.root.volume_id)
            self.local_segment = self.root.last_segment

    def save_again(self) -> None:
        """Write the local copy if that failed after a commit: until it is there no segment may go."""
        if self.copy_lags:
            with self._lock:
                self._save(self.root, {})

    def _is_saved(self) -> bool:
        try:
            saved = local.load(self._state_dir, self.root.volume_id, self._key)
        except CorruptObject:  # it is replaced
            return False
        return saved is not None and saved[:2] == (self.root, self.etag)

    def commit(self, store: ObjectStore, change: Change, adoptions: int | None = None) -> Root:
        """Put a root with ``change`` and use it. Returns it.

        With ``adoptions`` the change was planned on a manifest of that count of adoptions, and is
        refused after another. Raises Superseded, Fenced, StoreError (nothing is lost: commit again).
        """
        with self._lock:
            if adoptions is not None and adoptions != self.adoptions:
                raise Superseded(f"{self.root.name}: the manifest was replaced meanwhile")
            new_root, new_pages = edit(self.manifest(store), change)
            new_root, encoded = self._put_pages(store, new_root, new_pages)
            self.known_segment = max(self.known_segment, new_root.last_segment)
            new_root = msgspec.structs.replace(new_root, nonce=self._try(new_root))
            result = self._or_ours(
                store,
                lambda: lease.commit_root(
                    store, self._key, new_root, self.etag, base=self.root, tried=self._tried
                ),
            )
            if result.adopted is not None:
                self._adopt(result.adopted, result.etag)
                raise Superseded(f"{self.root.name}: the store had another root of this log, now in use")
            self._use(new_root, result.etag, encoded)
            return new_root

    def _try(self, root: Root) -> bytes:
        """Make it durable that ``root`` is about to be put; returns the nonce to put it with.

        If the disk fails, the log itself is the evidence instead: a restart must know the root, and data must
        get into the store above all when the disk fails. The nonce of the root in use is kept, too, for a
        start that finds no local root.
        """
        nonce = root.nonce
        tried = (*self._tried, nonce)[-local.MAX_TRIED + 1 :]
        try:
            local.save_tried(self._state_dir, self.root.volume_id, (self.root.nonce, *tried))
        except OSError as error:
            log.warning("volume %s: the nonce of a commit cannot be kept: %s", self.root.name, error)
            nonce = self._told_by_log(root) or nonce
            tried = (*self._tried, nonce)
        self._tried = tried
        return nonce

    def _told_by_log(self, root: Root) -> bytes | None:
        """The nonce of a root that is made of the log that is here; None where that cannot be read."""
        if root.log_id != self.root.log_id:
            return None
        if self._log is None:
            self._log = LogDigest(self._gather)
        try:
            return self._log.nonce(root, self.local_segment, self.known_segment)
        except GlideError as error:
            log.warning("volume %s: the content of its log is not known: %s", root.name, error)
            return None

    def _or_ours(self, store: ObjectStore, ask: Callable[[], T]) -> T:
        """Call ``ask``; again if the root that it rejects was made from our log. Raises what it raises."""
        try:
            return ask()
        except Fenced:
            try:
                found, _ = get_checked(store, self._key, decode_root)
            except NotFound:
                found = None
            if found is None or found.nonce in self._tried or found.nonce != self._told_by_log(found):
                raise
            self._tried = (*self._tried, found.nonce)
            return ask()

    def publish(self, store: ObjectStore) -> None:
        """Put the root as it is, if the store has none of this volume yet. Raises Fenced, StoreError."""
        with self._lock:
            if self.etag is not None:
                return
            self._published(
                self._or_ours(store, lambda: lease.commit_first(store, self._key, self.root, self._tried))
            )

    def was_published(self, store: ObjectStore) -> bool:
        """Whether the store has our first root already, from a put whose answer was lost; then it is in use.

        Nothing is put. Raises Fenced, StoreError.
        """
        with self._lock:
            found = self._or_ours(
                store, lambda: lease.resolve(store, self._key, self.root, None, self._tried)
            )
            if found is not None:
                self._published(found)
            return found is not None

    def _published(self, result: lease.CommitResult) -> None:
        """The store has the first root, or another one of this host."""
        if result.adopted is not None:
            self._adopt(result.adopted, result.etag)
        else:
            self._use(self.root, result.etag, {})

    def poll(self, store: ObjectStore, *, adopt: bool = True) -> None:
        """Find out whether the root in the store is still ours. Raises Fenced, StoreError.

        Another one of ours is used from then on, unless it is not to be adopted.
        """
        with self._lock:
            self._poll(store, adopt)

    def saw(self, etag: str | None, when: float) -> bool:
        """The store had a root of this ETag at ``when``, of ``time.monotonic``, or none (None).

        False where that is not the one in use: somebody must :meth:`poll`. Waits for nothing.
        """
        if not self._lock.acquire(blocking=False):
            return True  # a commit is under way, and finds out
        try:
            if self.last_contact >= when:
                return True  # one came in between
            if etag != self.etag:
                return False
            if self.confirmed:
                self.last_contact = when
            return True
        finally:
            self._lock.release()

    def copy(self, store: ObjectStore, put: Callable[[Root], None]) -> Root:
        """Call ``put`` with the root in use, which was published; returns it.

        The store names all of it until then: no commit comes in between, from here or from elsewhere.
        Raises Fenced, StoreError.
        """
        with self._lock:
            while True:
                root = self.root
                put(root)
                self._poll(store)
                if self.root is root:
                    return root

    def _poll(self, store: ObjectStore, adopt: bool = True) -> None:
        if self.etag is None:
            return
        try:
            etag: str | None = store.head(self._key).etag
        except NotFound:
            etag = None
        if etag != self.etag:
            found = self._or_ours(
                store, lambda: lease.resolve(store, self._key, None, self.root, self._tried)
            )
            assert found is not None
            assert found.adopted is not None
            if found.adopted is self.root:
                self._use(self.root, found.etag, {})  # the store was copied or restored
            elif adopt:
                self._adopt(found.adopted, found.etag)
        self.last_contact = time.monotonic()

    def _put_pages(
        self, store: ObjectStore, root: Root, pages: dict[int, Page]
    ) -> tuple[Root, dict[bytes, bytes]]:
        ids = list(root.page_ids)
        encoded: dict[bytes, bytes] = {}
        for number, page in sorted(pages.items()):
            data = encode_page(page, root.volume_id, secrets.token_bytes(ID_SIZE))
            new = page_id(data)
            store.put(page_key(self._prefix, new.hex()), data)
            self._meta.pages.put(new, page)
            ids[number] = new
            encoded[new] = data
        return (msgspec.structs.replace(root, page_ids=tuple(ids)) if pages else root), encoded

    def _adopt(self, root: Root, etag: str) -> None:
        if root.last_segment > self.known_segment:
            # New segments here bear numbers that the store has from segments that are gone.
            raise Fenced(
                root.name,
                f"the store has its log up to segment {root.last_segment}, but this host lost all "
                f"after segment {self.known_segment}; attach it with --take-over",
            )
        log.warning(
            "volume %s: the store has a root of this log that was not expected here (sequence %d, "
            "segment %d); going on from it",
            root.name,
            root.sequence,
            root.last_segment,
        )
        self.adoptions += 1
        self._use(root, etag, {})

    def _use(self, root: Root, etag: str, pages: dict[bytes, bytes]) -> None:
        self.root = root
        self.etag = etag
        self.last_contact = time.monotonic()
        self._save(root, pages)
        if not self.copy_lags:
            self._tried = ()  # an older one cannot come any more: its ETag is gone
        self._on_change()

    def _save(self, root: Root, pages: dict[bytes, bytes]) -> None:
        self._unsaved.update(pages)
        try:
            local.save(self._state_dir, root, self._key, self.etag, self._unsaved)
        except OSError as error:
            # Without the copy nothing may be retired, but the commit stands.
            log.error("volume %s: the local copy of its manifest cannot be written: %s", root.name, error)
            self.copy_lags = True
            return
        self._unsaved.clear()
        self.copy_lags = False
        self.local_segment = root.last_segment


def edit(manifest: Manifest, change: Change) -> Edited:
    """Apply ``change``. A replacement whose packs are no longer one run in its chunk is left out."""
    old = manifest.root
    size = old.size if change.size is None else change.size
    chunks = _edited_chunks(manifest, change, size)
    by_page: defaultdict[int, dict[int, tuple[PackRef, ...]]] = defaultdict(dict)
    for chunk, refs in chunks.items():
        by_page[chunk // PAGE_CHUNKS][chunk % PAGE_CHUNKS] = refs
    count = page_count(size)
    pages = {
        number: build_page(manifest.page(number), edits)
        for number, edits in by_page.items()
        if number < count
    }
    root = lease.next_root(
        old,
        size=size,
        last_segment=old.last_segment if change.last_segment is None else change.last_segment,
        transport=old.transport if change.transport is None else change.transport,
    )
    if count == 1:
        page = pages.get(0, manifest.page(0))
        return Edited(msgspec.structs.replace(root, page_ids=(b"",), inline_page=page), {})
    ids = list(old.page_ids[:count]) + [b""] * (count - len(old.page_ids))
    if old.inline_page is not None and old.inline_page.chunks:
        pages.setdefault(0, old.inline_page)
    for number in [n for n, page in pages.items() if not page.chunks]:
        ids[number] = b""
        del pages[number]
    return Edited(msgspec.structs.replace(root, page_ids=tuple(ids), inline_page=None), pages)


def _edited_chunks(manifest: Manifest, change: Change, size: int) -> dict[int, tuple[PackRef, ...]]:
    chunks: dict[int, tuple[PackRef, ...]] = dict.fromkeys(change.drops, ())
    for replace in change.replaces:
        refs = chunks.get(replace.chunk)
        if refs is None:
            refs = manifest.packs(replace.chunk)
        at = find_run(refs, replace.old)
        if at >= 0:
            chunks[replace.chunk] = refs[:at] + replace.new + refs[at + len(replace.old) :]
    for append in change.appends:
        for chunk in append.chunks:
            refs = chunks.get(chunk)
            if refs is None:
                refs = manifest.packs(chunk)
            chunks[chunk] = (*refs, append.ref)
    end, old_end = chunk_count(size), chunk_count(manifest.root.size)
    if end < old_end:
        chunks.update(dict.fromkeys(manifest.present(end, old_end - 1), ()))
    for chunk in [c for c in chunks if c >= end]:
        chunks[chunk] = ()
    return chunks


def find_run(refs: Iterable[PackRef], ids: tuple[bytes, ...]) -> int:
    """Where ``ids`` are, one after another, among ``refs``; -1 if they are not."""
    have = tuple(ref.id for ref in refs)
    width = len(ids)
    return next((i for i in range(len(have) - width + 1) if have[i : i + width] == ids), -1) if width else -1


def build_page(page: Page, edits: dict[int, tuple[PackRef, ...]]) -> Page:
    """``page`` with the packs of some chunks (numbers within the page) replaced; unused packs go."""
    kept = {chunk: indices for chunk, indices in page.chunks.items() if chunk not in edits}
    used = sorted({i for indices in kept.values() for i in indices})
    renumber = {old: new for new, old in enumerate(used)}
    table = [page.packs[i] for i in used]
    chunks = {chunk: tuple(renumber[i] for i in indices) for chunk, indices in kept.items()}
    where = {ref.id: i for i, ref in enumerate(table)}
    for chunk, refs in edits.items():
        for ref in refs:
            if ref.id not in where:
                where[ref.id] = len(table)
                table.append(ref)
        if refs:
            chunks[chunk] = tuple(where[ref.id] for ref in refs)
    return Page(packs=tuple(table), chunks=dict(sorted(chunks.items())))
