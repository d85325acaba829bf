"""The root of an export's record: which one to open with, and what the store says about it.

A start uses local files. What is damaged here, or may lack what was uploaded, is taken from the store, if the
store has it for this volume and this log.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from glidefs.errors import CorruptObject, Fenced, GlideError, StoreError, StoreWentBack, UnknownExport
from glidefs.exports.logs.closed import ExportLogs
from glidefs.exports.settings import RouterSettings
from glidefs.exports.stored import list_volumes
from glidefs.formats.export_record import ExportRecord
from glidefs.formats.manifest import NO_ID, Root, decode_root, manifest_hash
from glidefs.manifest import lease, local
from glidefs.manifest.local import LocalCopy
from glidefs.names import manifest_key
from glidefs.store.base import ObjectStore
from glidefs.store.resilient import ResilientStore
from glidefs.volume import logs
from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

STORE_PATIENCE = 5.0
LOOK_PATIENCE = 2.0
"""Seconds that the store has at a start to list the roots of a prefix, while nothing is served yet."""
NAMED = 10
"""Volumes that a message names."""


class Found(NamedTuple):
    """A root to open a volume with, and what the host has of it; see :class:`LocalCopy`."""

    root: Root
    etag: str | None
    copy: LocalCopy = LocalCopy.UNKNOWN


class Roots:
    """Finds roots. May be used by any thread, :meth:`look` by one while nobody compares."""

    def __init__(self, places: RouterSettings, store: ResilientStore, export_logs: ExportLogs) -> None:
        self._places = places
        self._store = store
        self._logs = export_logs
        self._seen: dict[str, str] = {}
        """ETags of roots by key, as a listing at the start told."""

    def look(self, records: Iterable[ExportRecord]) -> None:
        """Ask for the roots of many exports at once, which :meth:`is_as_seen` compares."""
        counts = Counter(
            record.prefix for record in records if record.root_published and not record.read_only
        )
        for prefix, due in counts.items():
            if self._store.away:
                return
            try:
                view = self._store.view("read", LOOK_PATIENCE)
                self._seen |= lease.list_etags(view, prefix, due) or {}
            except StoreError as error:
                log.warning("volumes of %s are compared with the store one by one: %s", prefix, error)

    def is_as_seen(self, volume: Volume) -> bool:
        """Whether the store had the root in use when :meth:`look` asked."""
        etag = self._seen.get(manifest_key(volume.prefix, volume.name))
        return etag is not None and etag == volume.etag

    def forget(self) -> None:
        """What was seen is old."""
        self._seen = {}

    def find(self, record: ExportRecord, *, alone: bool = True) -> Found:
        """The root to open a volume with; from the store where the local copy is lost.

        ``alone``: no other process serves the volume now. Raises CorruptObject, Fenced, GlideError,
        StoreError, OSError.
        """
        key = manifest_key(record.prefix, record.name)
        try:
            saved = local.load(self._places.state_dir, record.volume_id, key)
        except CorruptObject as error:
            log.warning("%s: %s; asking the store", record.name, error)
            saved = None
        if saved is not None:
            root, etag, data = saved
            if etag is None and manifest_hash(data) != record.manifest_hash:
                raise CorruptObject(record.name, 0, "the local root is not the one that its record names")
            ours = root.volume_id == record.volume_id and root.log_id == record.log_id
            if ours and not (etag is None and record.root_published):
                return self._newest(record, Found(root, etag, LocalCopy.READ), alone)
        if record.root and manifest_hash(record.root) == record.manifest_hash:
            first = decode_root(key, record.root, f"record of {record.name}")
            return self._newest(record, Found(first, None), alone)
        if not record.root_published:
            raise GlideError(f"{record.name}: its root is neither on this host nor known to be in the store")
        view = self._store.view("read", STORE_PATIENCE)
        try:
            found, etag = lease.read_root(view, record.prefix, record.name)
        except UnknownExport:
            raise Fenced(record.name, "its manifest is not in the store: another node removed it") from None
        if found.volume_id != record.volume_id or found.log_id != record.log_id:
            raise Fenced(record.name, f"node {found.owner_node or '(none)'} has the volume now")
        if self._logs.put_here(found, record) is False:
            raise GlideError(
                f"{record.name}: its local root is lost, and the store's (sequence {found.sequence}) "
                "was not put from here: a copy of this host put it, or the store went back in time; "
                f"'glidefs attach {record.name} --take-over' serves what the store has"
            )
        return Found(found, etag)

    def _newest(self, record: ExportRecord, here: Found, alone: bool) -> Found:
        """The root to open with: the store's own if the log may have lost what was uploaded.

        What a sync failed to write is uploaded from the page cache. If the power fails before the local root
        includes it, the log lacks it: guests would see the volume go back, and forward again once the store's
        root is found, or comes: what is still on its way is made to fail. Raises Fenced, StoreError, OSError.
        """
        seen = logs.look(self._logs.path(record))
        if seen.empty and here.copy is LocalCopy.READ:
            return here._replace(copy=LocalCopy.ENOUGH)
        if not seen.lost_syncs:
            return here
        view = self._store.view("read", STORE_PATIENCE)
        while True:
            try:
                found, found_etag = lease.read_root(view, record.prefix, record.name)
            except UnknownExport:
                return here  # not put yet, or the first commit finds out
            if found.volume_id != record.volume_id or found.log_id != record.log_id:
                break
            # An older one has less than what is here, and one that was not tried here is a copy's: the
            # comparison before guests come says which.
            tried = local.load_tried(self._places.state_dir, record.volume_id)
            newer = found.sequence > here.root.sequence and found.nonce in tried
            if not newer and found.nonce != here.root.nonce:
                return here
            if not alone or found.nonce in tried[-1:]:
                return Found(found, found_etag) if newer else here
            with contextlib.suppress(Fenced):  # one that was on its way came: see which
                if (anew := self._put_anew(view, record, found, found_etag)) is not None:
                    return anew
        if here.etag is None or lease.went_back(found, here.root):
            return here  # another's name, which the first put finds out; or to be compared, as above
        raise Fenced(record.name, f"node {found.owner_node or '(none)'} has the volume now")

    def check_not_older(self, record: ExportRecord) -> None:
        """Raises StoreWentBack where the store has an older root than the local copy. StoreError."""
        key = manifest_key(record.prefix, record.name)
        try:
            saved = local.load(self._places.state_dir, record.volume_id, key)
            found, _ = lease.read_root(self._store.view("read", STORE_PATIENCE), record.prefix, record.name)
        except (CorruptObject, UnknownExport):
            return
        if saved is not None and lease.went_back(found, saved[0]):
            raise StoreWentBack(key, saved[0].sequence, found.sequence)

    def given_up(self, record: ExportRecord) -> bool:
        """Whether this host gave the volume up by a put of which it did not hear.

        If not, that put cannot come any more: the root is put anew, and one that is still on its way finds
        another ETag. Raises StoreError, OSError: not known.
        """
        view = self._store.view("background", STORE_PATIENCE)
        while True:
            try:
                root, etag = lease.read_root(view, record.prefix, record.name)
            except UnknownExport:
                return record.root_published
            if root.volume_id == record.volume_id and root.owner_host == NO_ID:
                return True
            same_log = root.volume_id == record.volume_id and root.log_id == record.log_id
            if not same_log or self._logs.put_here(root, record) is False or self._is_older(record, root):
                return False  # another has it, or the store went back, which opening it finds out
            with contextlib.suppress(Fenced):  # it came, or somebody was faster: see which
                if self._put_anew(view, record, root, etag) is not None:
                    return False

    def _is_older(self, record: ExportRecord, root: Root) -> bool:
        """Whether the store's root is older than the local copy: nothing is put over it then."""
        key = manifest_key(record.prefix, record.name)
        try:
            saved = local.load(self._places.state_dir, record.volume_id, key)
        except CorruptObject:
            return False
        return saved is not None and lease.went_back(root, saved[0])

    def _put_anew(self, store: ObjectStore, record: ExportRecord, root: Root, etag: str) -> Found | None:
        """Put the root once more. None: another of ours is there. Raises Fenced, StoreError, OSError."""
        place = self._places.state_dir, record.volume_id
        tried = local.load_tried(*place) or (root.nonce,)
        new = lease.next_root(root)
        local.save_tried(*place, (*tried[-local.MAX_TRIED + 1 :], new.nonce))
        key = manifest_key(record.prefix, record.name)
        result = lease.commit_root(store, key, new, etag, base=root, tried=tried)
        return Found(new, result.etag) if result.adopted is None else None

    def offer(self) -> bool:
        """Name the volumes that the store says another host of this name had. True when complete.

        They are not taken: a name is no evidence, as another host may have it.
        """
        view = self._store.view("background", STORE_PATIENCE)
        owner = self._places.owner
        try:
            for prefix in self._places.prefixes:
                lost = [found.name for found in list_volumes(view, prefix) if found.is_candidate(owner)]
                if lost:
                    log.warning(
                        "prefix %s has %d volumes of another host that was called %s (%s): if that host or "
                        "its disk is lost, take them with 'glidefs attach --all --node %s --take-over'",
                        prefix,
                        len(lost),
                        owner.node,
                        ", ".join(lost[:NAMED]),
                        owner.node,
                    )
        except StoreError as error:
            log.warning("cannot look for volumes of this node in the store yet: %s", error)
            return False
        return True
