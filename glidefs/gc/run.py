"""Garbage collection: delete the packs and pages of a prefix that no root names any more.

It works on the store alone, while hosts write to it. Why nothing that is needed is deleted:

- *The order.* Packs and pages are listed first and roots read after that. Whatever is named by a root
  that was committed before the listing is seen there; what is put later is not a candidate.
- *Grace.* A host names only packs that it put less than half the grace before, or that it took from a root it
  read less than half the grace before (a quarter, and a quarter for a cached base). So an object goes only if
  it is older than the grace, and if an earlier run, at least a grace ago, saw it without a root, too. An
  object that a root names again starts anew. One that an upload may still commit, younger than half the
  grace, does not count as seen: it could be named and dropped again until the next run, with a fork under way
  that holds it.
- *Clocks.* Ages count by the store's clock: the time of an object that the run has just put. They end
  at the start of the run, and a sighting begins at the end of its marking: a run may take long.
- *Looking again.* A listing takes time. A root that is put where the listing has been already, made from
  one that is removed before the listing gets there, escapes it. So roots are listed again until
  a listing shows nothing new (twice at least), and once more before each batch of deletes.
- *Checkpoints.* What the checkpoint of an interrupted bless names is kept until the checkpoint goes: when its
  base is there, or when it is older than the grace and an earlier run, at least a grace ago, saw this version
  of it. What it named then begins to wait. A bless that goes on puts it anew, under its ETag, before it uses
  a pack; a run replaces it under its ETag before it deletes it: one of them is too late, and knows. The bless
  takes packs younger than half the grace by the store's clock only, and what gets older than that before it
  is published is copied. So what a bless names was put less than half the grace before, as with an upload;
  the checkpoint holds what a *later* bless may take, and one from which it could take something is not
  removed. The delete may hit a checkpoint that was put after the replacement: the bless that put it goes on
  all the same.
- *Failing closed.* A root or page that cannot be read, or an object whose kind is not known here,
  ends the run with nothing deleted.
- *One at a time.* The state is put under its ETag before the first delete: of two runs that overlap,
  the one that gets there later deletes nothing. It still lists what is about to be deleted, so a
  crash in between costs nothing: the next run goes on.

- *Copies.* A fork, snapshot, tag or base is made of a pin: a root put while the source still named it all,
  which goes when the copy is there (see glidefs/exports/copies/pins.py). A fork of a base is put later, but
  the base does not change, and its tombstone stays for the grace. So what no root names, and no upload is
  about to commit, is never named again: what a run saw of it still holds at the next. Pins that a crash left
  go when they are older than the grace.

What is left: a store has no transactions. A root handed on twice, each time to a fork put behind the
listing while its source is removed ahead of it, in every look of both runs, escapes.

A checkpoint that is damaged names nothing, for a bless too, and goes like the others.

The removal of a base leaves a tombstone, a root like any other until it is a grace old. It is then
deleted, and what it named becomes garbage of later runs. So it is with the tombstone of a volume, unless a
create takes its name before.
"""

from __future__ import annotations

import secrets
import time
from concurrent.futures import Executor, ThreadPoolExecutor

import msgspec

from glidefs import names
from glidefs.errors import Conflict, CorruptObject, GcRefused, NotFound, PreconditionFailed
from glidefs.formats.blessing import encode_blessing, make_blessing
from glidefs.formats.gc_state import (
    FirstSeen,
    SeenCheckpoint,
    decode_state,
    encode_state,
    first_seen,
    make_state,
)
from glidefs.formats.manifest import encode_root
from glidefs.formats.pack import ID_SIZE
from glidefs.gc.mark import THREADS, Candidates, Checkpoint, Marker, Progress, in_parallel
from glidefs.manifest import lease
from glidefs.store.base import ObjectStore, dir_name
from glidefs.store.clock import store_time

DEFAULT_LIMIT = 10_000
"""Objects that a run deletes at most."""
BATCH = 1000
"""Deletes between two looks at the roots."""


class Tally(msgspec.Struct, frozen=True):
    """So many packs and pages, and their bytes in the store."""

    objects: int = 0
    bytes: int = 0


class GcResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a run found and did.

    ``listed`` = ``marked`` + ``unreferenced``, ``unreferenced`` = ``waiting`` (for ``grace`` seconds to
    pass) + ``due``, ``due`` = ``deleted`` + ``left`` for the next run. A dry run deletes nothing.
    ``roots`` were read, ``tombstones``, ``checkpoints`` of blesses and ``pins`` of copies deleted.
    ``strays`` are objects among packs and pages that bear no id; they are left alone. ``note`` says what an
    operator should know, or is empty.
    """

    prefix: str
    dry_run: bool
    grace: float
    roots: int = 0
    listed: Tally = Tally()
    marked: Tally = Tally()
    unreferenced: Tally = Tally()
    waiting: Tally = Tally()
    due: Tally = Tally()
    deleted: Tally = Tally()
    left: Tally = Tally()
    tombstones: int = 0
    checkpoints: int = 0
    pins: int = 0
    strays: int = 0
    note: str = ""


def collect(
    store: ObjectStore,
    prefix: str,
    *,
    grace: float,
    limit: int = DEFAULT_LIMIT,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> GcResult:
    """One run of gc over ``prefix``.

    ``grace`` in seconds, not below that of the hosts ([store] gc_grace). At most ``limit`` objects are
    deleted. A ``dry_run`` needs read access only; as it cannot ask the store's clock, what it reports
    goes by the local one.

    Raises CorruptObject where a root or page cannot be decoded or a page is missing, GcRefused where
    an object is not known or another run was faster, StoreError; ValueError for negative numbers.
    Until the first delete, any of them means that nothing was deleted.
    """
    if not 0 <= grace < float("inf") or limit < 0:
        raise ValueError(f"grace {grace} or limit {limit} is out of range")
    with ThreadPoolExecutor(THREADS, "gc") as pool:
        return _Run(store, names.check_prefix(prefix), grace, limit, dry_run, pool, progress).run()


class _Run:
    """One run: load the state, list, mark, save the state, delete."""

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        grace: float,
        limit: int,
        dry_run: bool,
        pool: Executor,
        progress: Progress | None,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._grace = grace
        self._limit = limit
        self._dry_run = dry_run
        self._pool = pool
        self._tell: Progress = progress or (lambda what, done, total: None)
        self._state_etag: str | None = None
        self._note = ""
        self._seen_checkpoints: dict[tuple[str, str], float] = {}
        """When earlier runs first saw a version of one: by base and ETag."""

    def run(self) -> GcResult:
        """All of it."""
        if not self._check_layout():
            note = "there is nothing under this prefix"
            return GcResult(prefix=self._prefix, dry_run=self._dry_run, grace=self._grace, note=note)
        seen_packs, seen_pages = self._load_state()
        self._packs = Candidates("packs", lambda id_: names.pack_key(self._prefix, id_), seen_packs)
        self._pages = Candidates("pages", lambda id_: names.page_key(self._prefix, id_), seen_pages)
        self._kinds = (self._packs, self._pages)
        self._marker = Marker(self._store, self._prefix, self._pool, self._packs, self._pages, self._tell)
        self._started = self._now()
        for kind in self._kinds:
            infos = self._store.list(f"{self._prefix}/{kind.place}/")
            for count in kind.fill(infos, self._started, self._grace):
                self._tell(f"listing {kind.place}", count, 0)
        self._marker.mark()
        self._marked = self._now()
        if self._marker.damaged:
            some = ", ".join(sorted(self._marker.damaged)[:3])
            self._note = self._note or f"checkpoints of blesses that are damaged, and so keep nothing: {some}"
        deleted, tombstones, checkpoints, pins = Tally(), 0, 0, 0
        if not self._dry_run:
            self._save_state()
            tombstones = self._delete_tombstones()
            room = self._limit - 2 * tombstones
            checkpoints = self._delete_checkpoints(room)
            room -= checkpoints
            pins = self._delete_pins(room)
            deleted = self._delete(self._due()[: room - pins])
        return self._result(deleted, tombstones, checkpoints, pins)

    def _check_layout(self) -> bool:
        """Is there anything of ours? Raises GcRefused where a newer version may keep roots."""
        known = {"packs", "pages", "volumes", "bases", "tags", "gc"}
        found = {dir_name(directory) for directory in self._store.list_dirs(f"{self._prefix}/")}
        for name in sorted(found - known):
            if not name.startswith("."):
                raise GcRefused(
                    self._prefix,
                    f"what is below {self._prefix}/{name}/ is not known to this version and may name packs; "
                    "run gc of the newest version in use, or move it away",
                )
        return bool(found & known - {"gc"})

    def _now(self) -> float:
        """The time by the store's clock, in unix seconds."""
        if self._dry_run:
            return time.time()
        return store_time(self._store, self._prefix)

    # -- the state -----------------------------------------------------------------------------

    def _load_state(self) -> tuple[FirstSeen, FirstSeen]:
        key = names.gc_state_key(self._prefix)
        try:
            found = self._store.get(key)
        except NotFound:
            return {}, {}
        self._state_etag = found.etag
        try:
            state = decode_state(key, found.data)
        except CorruptObject as error:
            # Without it nothing can be deleted, so it is safe to begin again.
            self._note = f"{key}: corrupt at byte {error.offset}: {error.why}; every grace begins anew"
            return {}, {}
        self._seen_checkpoints = {(seen.base, seen.etag): seen.since for seen in state.checkpoints}
        return first_seen(state)

    def _sightings(self, kind: Candidates) -> FirstSeen:
        """What is unreferenced, and since when; a time in the future was of a clock that was wrong."""
        end = self._marked
        return {id_: min(kind.seen.get(id_, end), end) for id_ in kind.sizes if id_ not in kind.newborn}

    def _checkpoint_sightings(self) -> list[SeenCheckpoint]:
        end = self._marked
        found = ((checkpoint.base, checkpoint.info.etag) for checkpoint in self._marker.checkpoints)
        return [SeenCheckpoint(min(self._seen_checkpoints.get(key, end), end), *key) for key in found]

    def _save_state(self) -> None:
        """Put the state over the one that was loaded. Raises GcRefused if that was replaced."""
        key = names.gc_state_key(self._prefix)
        packs, pages = (self._sightings(kind) for kind in self._kinds)
        state = make_state(secrets.token_bytes(ID_SIZE), packs, pages, self._checkpoint_sightings())
        data = encode_state(state, names.gc_state_key(self._prefix))
        etag = self._state_etag
        try:
            self._state_etag = self._store.put(key, data, if_match=etag, if_none_match=etag is None)
        except (PreconditionFailed, Conflict) as error:
            try:
                found = self._store.get(key)
            except NotFound:
                found = None
            if found is None or found.data != data:  # else it was our own put, whose answer was lost
                raise GcRefused(
                    self._prefix, "another run of gc was faster; run it again when that one has ended"
                ) from error
            self._state_etag = found.etag

    @property
    def _newest(self) -> float:
        """What is to be deleted is of this time, or older."""
        return self._started - self._grace

    # -- deleting ------------------------------------------------------------------------------

    def _due(self) -> list[tuple[float, Candidates, bytes]]:
        """What may be deleted, with when it was first seen; the oldest first."""
        due = [
            (since, kind, id_)
            for kind in self._kinds
            for id_, since in kind.seen.items()
            if since <= self._newest and id_ in kind.sizes and id_ not in kind.young
        ]
        due.sort(key=lambda item: item[0])
        return due

    def _delete_tombstones(self) -> int:
        """Delete tombstones that are old enough, with the hot sets of bases. Returns how many."""
        deleted = 0
        for key, tombstone in self._marker.tombstones.items():
            if tombstone.last_modified > self._newest or 2 * (deleted + 1) > self._limit:
                continue
            # A store has no conditional delete. So the tombstone is replaced under its ETag first: the
            # name may have been freed and used again, another run must wait for the grace now, and no
            # create takes the name of a doomed one.
            claimed = lease.tombstone(tombstone.root, doomed=True)
            try:
                self._store.put(key, encode_root(claimed, key), if_match=tombstone.etag)
            except (PreconditionFailed, Conflict):
                continue
            if key.startswith(names.bases_prefix(self._prefix)):
                self._store.delete(key.removesuffix("manifest") + "hot-set")
            self._store.delete(key)
            deleted += 1
        return deleted

    def _is_stale(self, checkpoint: Checkpoint) -> bool:
        info = checkpoint.info
        since = self._seen_checkpoints.get((checkpoint.base, info.etag), self._marked)
        return checkpoint.is_done or max(since, info.last_modified) <= self._newest

    def _delete_checkpoints(self, limit: int) -> int:
        """Delete checkpoints that no bless will go on with, at most ``limit``. Returns how many."""
        deleted = 0
        for checkpoint in filter(self._is_stale, self._marker.checkpoints):
            if deleted >= limit:
                break
            key = checkpoint.info.key
            empty = encode_blessing(make_blessing(0, (), 0), key)
            try:
                self._store.put(key, empty, if_match=checkpoint.info.etag)
            except (PreconditionFailed, Conflict):
                continue  # a bless goes on with it
            self._store.delete(key)
            deleted += 1
        return deleted

    def _delete_pins(self, limit: int) -> int:
        """Delete pins that were left behind, at most ``limit``. Returns how many."""
        stale = [pin for pin in self._marker.pins if pin.last_modified <= self._newest]
        for pin in stale[:limit]:
            self._store.delete(pin.key)
        return len(stale[:limit])

    def _delete(self, todo: list[tuple[float, Candidates, bytes]]) -> Tally:
        """Delete, a batch at a time, what still no root names."""
        objects = nbytes = 0
        for start in range(0, len(todo), BATCH):
            unnamed = sum(len(kind.sizes) for kind in self._kinds)
            self._marker.look()
            if sum(len(kind.sizes) for kind in self._kinds) != unnamed:
                # What a root names after all must wait for a whole grace when that goes.
                self._save_state()
            batch = [(kind, id_) for _, kind, id_ in todo[start : start + BATCH] if id_ in kind.sizes]
            for _ in in_parallel(self._pool, self._delete_one, batch):
                objects += 1
                self._tell("deleting", objects, len(todo))
            nbytes += sum(kind.sizes[id_] for kind, id_ in batch)
        return Tally(objects, nbytes)

    def _delete_one(self, item: tuple[Candidates, bytes]) -> None:
        kind, id_ = item
        self._store.delete(kind.key(id_.hex()))

    # -- the result ----------------------------------------------------------------------------

    def _result(self, deleted: Tally, tombstones: int, checkpoints: int, pins: int) -> GcResult:
        kinds = self._kinds
        listed = Tally(sum(kind.listed for kind in kinds), sum(kind.listed_bytes for kind in kinds))
        unreferenced = Tally(
            sum(len(kind.sizes) for kind in kinds), sum(sum(kind.sizes.values()) for kind in kinds)
        )
        found = self._due()
        due = Tally(len(found), sum(kind.sizes[id_] for _, kind, id_ in found))
        return GcResult(
            prefix=self._prefix,
            dry_run=self._dry_run,
            grace=self._grace,
            roots=self._marker.roots,
            listed=listed,
            marked=_less(listed, unreferenced),
            unreferenced=unreferenced,
            waiting=_less(unreferenced, due),
            due=due,
            deleted=deleted,
            left=_less(due, deleted),
            tombstones=tombstones,
            checkpoints=checkpoints,
            pins=pins,
            strays=sum(kind.strays for kind in kinds),
            note=self._note,
        )


def _less(all_: Tally, some: Tally) -> Tally:
    return Tally(all_.objects - some.objects, all_.bytes - some.bytes)
