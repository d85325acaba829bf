"""ExportRouter: names to exports, and the verbs on them.

A verb holds the lock of its export and nothing else, so verbs on different exports never wait for
each other. What is durable and in which order:

    create   record and local root are fsynced, then served; the store has the root before or after that
    fork     the same; the root is put in the background, and one that loses its name is fenced
    attach   the root names us in the store, then record and local root are fsynced, then served
    detach   guests are let go, everything is uploaded, the root names nobody, the record goes last
    remove   guests are let go, the root becomes a tombstone and goes, then log and record

A crash between two steps leaves a state from which the next start, or the same verb again, goes on.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from msgspec.structs import asdict, replace

from glidefs.bases.manifest_cache import BaseLibrary
from glidefs.errors import (
    ConfigError,
    ExportExists,
    Fenced,
    GlideError,
    NotSupported,
    Refused,
    StoreError,
    UnknownExport,
)
from glidefs.exports.copies.lineage import Lineage, Origin
from glidefs.exports.copies.verbs import ForkVerbs
from glidefs.exports.health import judged
from glidefs.exports.leaving import Leaving
from glidefs.exports.logs.verbs import LogVerbs
from glidefs.exports.opener import Opener
from glidefs.exports.requests import AttachRequest, CreateRequest, ExportStatus, check_named, normal_size
from glidefs.exports.roots import Found
from glidefs.exports.settings import RouterSettings
from glidefs.exports.stored import list_volumes
from glidefs.exports.survey import Seen, survey
from glidefs.exports.table import Entry, ExportTable, RecordDirectory, new_record
from glidefs.formats.export_record import ExportRecord
from glidefs.formats.manifest import Root
from glidefs.host.host import Host
from glidefs.manifest import lease
from glidefs.manifest.lease import delete_root, put_first_root, same_as
from glidefs.names import Source, check_name, check_prefix, parse_source
from glidefs.store.resilient import ResilientStore
from glidefs.transport.base import Transport, choose_transport

log = logging.getLogger(__name__)

PUBLISH_PATIENCE = 2.0
"""Seconds that a create without --wait gives the store to take the root."""
PUBLISH_THREADS = 8
VERB_PATIENCE = 30.0
"""Seconds that other verbs give the store."""
STANDBY_THREADS = 4


class ExportRouter:
    """All exports of this host. Every method may be called from any thread and may block."""

    def __init__(
        self,
        host: Host,
        store: ResilientStore,
        transports: Sequence[Transport],
        settings: RouterSettings,
        bases: BaseLibrary,
        stopping: threading.Event,
    ) -> None:
        self.table = ExportTable()
        self.bases = bases
        self._host = host
        self._store = store
        self._settings = settings
        self._stopping = stopping
        self._refusing = False
        self._standby: list[Entry] = []
        self._publishers = ThreadPoolExecutor(PUBLISH_THREADS, "publish")
        self._records = RecordDirectory(settings.exports_dir)
        by_kind: Mapping[str, Transport] = {transport.kind: transport for transport in transports}
        self._transports = by_kind
        self.logs = LogVerbs(self._records, self.table, settings.logs_dir, settings.state_dir)
        self._opener = Opener(self.table, self._records, host, store, by_kind, settings, stopping)
        self._lineage = Lineage(self.table, store, bases)
        self.forks = ForkVerbs(
            self.table, self._records, self._opener, host, store, bases, self._lineage, stopping
        )
        self._leaving = Leaving(
            self.table, self._records, self._opener, store, self._lineage, host.settings.gc_grace
        )

    # -- life ----------------------------------------------------------------------------------

    def has_records(self) -> bool:
        """Whether this host served exports before."""
        return bool(self._records.names())

    def start(self) -> None:
        """Begin to open what this host served before; returns at once."""
        entries = self._opener.load()
        self._opener.start(entries)
        self.bases.start(self._prefixes, self._opener.tried)

    def start_standby(self, names: Sequence[str]) -> list[Entry]:
        """Open these exports while another process serves them. Raises GlideError for one that fails."""
        self._standby = self._opener.load(standby=True)
        mine = {entry.name: entry for entry in self._standby}
        if missing := set(names) - set(mine):
            raise GlideError(f"this host has no record of {', '.join(sorted(missing))}")
        chosen = [mine[name] for name in names]
        with ThreadPoolExecutor(STANDBY_THREADS, "standby") as pool:
            list(pool.map(self._opener.prepare, chosen))
        return chosen

    def end_standby(self) -> None:
        """The exports are ours: open those that were not handed over, and look after all."""
        self._opener.start([entry for entry in self._standby if not entry.serves()])
        self.bases.start(self._prefixes, self._opener.tried)

    @property
    def opener(self) -> Opener:
        """For the handoff: it opens and closes entries whose locks it holds."""
        return self._opener

    def abandon(self) -> None:
        """Another process has the exports: forget them without a word to guests, disk or store.

        Waits for nothing that may wait for the store: :meth:`close` does.
        """
        self._stopping.set()
        self._opener.abandon()

    def _prefixes(self) -> set[str]:
        """Those configured and those of the exports."""
        records = [entry.record for entry in self.table.all()]
        return {*self._settings.prefixes, *(record.prefix for record in records if record is not None)}

    def wait_tried(self, timeout: float) -> bool:
        """Wait until every recorded export was tried once; False when time is up."""
        return self._opener.tried.wait(timeout)

    def refuse_changes(self) -> None:
        """From now on every verb that changes something is refused."""
        self._refusing = True

    def let_go(self, *, remove_devices: bool) -> None:
        """The daemon stops: guests are let go, logs are synced, volumes are closed. Records stay."""
        self._refusing = True
        self._opener.let_go(remove_devices)

    def close(self) -> None:
        """End the background threads and close what is still open."""
        self._stopping.set()
        self._publishers.shutdown(wait=False, cancel_futures=True)
        self.bases.close()
        self._opener.close()

    def check_changes(self) -> None:
        """Raises GlideError once the daemon stops, and during a handoff."""
        if self._refusing:
            raise Refused("the daemon is stopping; try again when it is back")
        self.table.check_open()

    def device_down(self, name: str) -> bool:
        """The kernel took the device of an export away. Does not block. False: a verb has the export."""
        entry = self.table.find(name)
        return entry is None or entry.device_down()

    # -- looking -------------------------------------------------------------------------------

    def listing(self) -> list[ExportStatus]:
        """All exports, by name."""
        return [seen.status for seen in self.survey()]

    def survey(self) -> list[Seen]:
        """The same with what the core says about their volumes."""
        return survey(self.table, self._store.state, self._host.settings.max_dirty_age)

    def show(self, name: str) -> ExportStatus:
        """One export. Raises UnknownExport."""
        status = self.table.get(name).status()
        return judged(status, self._store.state, self._host.settings.max_dirty_age)

    # -- create --------------------------------------------------------------------------------

    def create(self, name: str, wanted: CreateRequest) -> ExportStatus:
        """Make an empty volume or a fork and serve it. The same call again returns what is there.

        Raises ExportExists where the name is taken by something else, ConfigError, NotSupported,
        UnknownExport for a source that is not there.
        """
        self.check_changes()
        check_name("export", name)
        source = parse_source(wanted.source) if wanted.source is not None else None
        if source is None and wanted.size is None:
            raise ConfigError("a new volume needs a size; give --size, or --from with what to fork")
        size = None if wanted.size is None else normal_size(wanted.size)
        prefix = check_prefix(wanted.prefix or self._settings.prefixes[0])
        choose_transport(wanted.transport, self._transports)
        present = self.table.find(name)
        if present is not None:
            return self._present(present, wanted, source, size, prefix)
        check_named(prefix, self._settings.prefixes, new=wanted.new_prefix)
        with self.table.reserved(name) as entry, self._origin(prefix, source) as origin:
            root, size = self._first_root(name, wanted, origin, size)
            entry.record = replace(new_record(root, prefix, wanted.transport, published=False), size=size)
            if self._settings.logs_missing:
                self._opener.check_log(entry.record)
            try:
                self._create(entry, root, wanted.wait)
            except BaseException:
                self._opener.close_entry(entry, remove_device=True)
                self._opener.forget(entry)
                raise
            self._prefetch(entry, wanted, source)
            return entry.status(created=True, note=origin.note if origin else "", figures=False)

    def _origin(self, prefix: str, source: Source | None) -> contextlib.AbstractContextManager[Origin | None]:
        return contextlib.nullcontext() if source is None else self._lineage.origin(prefix, source)

    def _first_root(
        self, name: str, wanted: CreateRequest, origin: Origin | None, size: int | None
    ) -> tuple[Root, int]:
        """The root of a new volume, and the volume's size. Raises ConfigError."""
        owner, transport, flush = self._settings.owner, wanted.transport, wanted.flush
        if origin is None:
            assert size is not None
            root = lease.empty_root(name, size, owner, transport=transport, flush=flush)
        else:
            size = normal_size(origin.root.size) if size is None else size
            if size < origin.root.size:
                raise ConfigError(
                    f"{origin.source} has {origin.root.size} bytes, a fork has at least as many; "
                    "leave --size out"
                )
            root = lease.fork_root(
                origin.root, name, size, owner, source=str(origin.source), transport=transport, flush=flush
            )
        return replace(root, read_only=wanted.read_only), size

    def _create(self, entry: Entry, root: Root, wait: bool) -> None:
        """Root, record, volume. Nobody else can know a fork of a base yet: it is served first and put later.

        The source of any other fork is pinned only until the fork is in the store. So its record is written
        after the put: a crash cannot leave such a fork to be put later. A view is never put.
        """
        assert entry.record is not None
        prefix, view = entry.record.prefix, entry.record.is_view
        of_base = root.source.startswith("base:")
        etag: str | None = None
        if root.source and not of_base and not view:
            etag = self._publish(entry, prefix, root, must=True)
        try:
            self._opener.begin(entry, entry.record)
            if not root.source or (of_base and wait and not view):
                # Nobody commits for a read-only export, so its root cannot come later.
                etag = self._publish(entry, prefix, root, must=wait or root.read_only)
            self._opener.open(entry, Found(root, etag))
        except BaseException:
            if etag is not None:
                self._undo_root(prefix, root)
            raise

    def _publish(self, entry: Entry, prefix: str, root: Root, *, must: bool) -> str | None:
        """Put the first root; None if the store does not take it now. Raises ExportExists, StoreError.

        A request may hang for longer than a create waits, so it has its own thread: if the root reaches the
        store later, the uploader finds it there and goes on from it.
        """
        if must:
            return put_first_root(self._store.view("upload", VERB_PATIENCE), prefix, root)
        view = self._store.view("upload", PUBLISH_PATIENCE)
        asked: Future[str] = self._publishers.submit(put_first_root, view, prefix, root)
        try:
            return asked.result(PUBLISH_PATIENCE)
        except TimeoutError:
            asked.cancel()  # where other requests that hang have all threads
            why: object = "it does not answer"
        except StoreError as error:
            if not error.temporary:
                raise
            why = error
        log.warning("%s: the store does not know the volume yet: %s", entry.name, why)
        return None

    def _prefetch(self, entry: Entry, wanted: CreateRequest, source: Source | None) -> None:
        """Begin to make the hot set of a fork's base resident."""
        if source is None or source.kind != "base" or not wanted.prefetch or entry.volume is None:
            return
        prefix = entry.volume.prefix
        self._host.prefetcher.start(entry.volume, lambda: self.bases.hot_set(prefix, source.name).blocks())

    def _undo_root(self, prefix: str, root: Root) -> None:
        try:
            delete_root(self._store.view("upload", VERB_PATIENCE), prefix, root, same_as(root), now=True)
        except GlideError as error:
            log.warning("%s: its root stays in the store: %s", root.name, error)

    def _present(
        self, entry: Entry, wanted: CreateRequest, source: Source | None, size: int | None, prefix: str
    ) -> ExportStatus:
        with entry.lock:
            self.table.check_open()
            record = entry.record
            if entry.gone or record is None:
                raise ExportExists(entry.name)
            if entry.is_fenced():
                raise ExportExists(entry.name, f"is fenced here: {entry.fence_reason()}; attach or detach it")
            same = (record.prefix, record.read_only, record.flush, record.source) == (
                prefix,
                wanted.read_only,
                wanted.flush,
                str(source) if source else "",
            )
            same = same and size in (None, record.size)
            if not same or wanted.transport not in ("auto", record.transport):
                raise ExportExists(entry.name, "exists with other settings; 'glidefs show' prints them")
            return entry.status(created=False)

    # -- attach --------------------------------------------------------------------------------

    def attach(self, name: str, wanted: AttachRequest) -> ExportStatus:
        """Serve a volume of the store here. One that is served already is left as it is.

        Raises UnknownExport, OwnedElsewhere (unless `take_over`), StoreError.
        """
        self.check_changes()
        check_name("export", name)
        prefix = check_prefix(wanted.prefix or self._settings.prefixes[0])
        choose_transport(wanted.transport, self._transports)
        present = self.table.find(name)
        if present is not None:
            return self._attach_again(present, wanted)
        with self.table.reserved(name) as entry:
            self._attach(entry, prefix, wanted)
        return entry.served_status()

    def _attach(self, entry: Entry, prefix: str, wanted: AttachRequest) -> None:
        anew = wanted.take_over or wanted.accept_older
        if not anew and self._opener.take_lost(entry, prefix, wanted.transport):
            return
        root, etag = self._lease(prefix, entry.name, wanted)
        self._take(entry, prefix, root, etag, wanted)

    def _lease(self, prefix: str, name: str, wanted: AttachRequest) -> tuple[Root, str]:
        store = self._store.view("upload", VERB_PATIENCE)
        return lease.attach(
            store,
            prefix,
            name,
            self._settings.owner,
            take_over=wanted.take_over or wanted.accept_older,
            has_log=self._leaving.has_log,
        )

    def _take(self, entry: Entry, prefix: str, root: Root, etag: str, wanted: AttachRequest) -> None:
        transport = wanted.transport if wanted.transport != "auto" else root.transport
        self._opener.take(entry, prefix, root, etag, transport)

    def stored_volumes(self, prefix: str | None) -> list[dict[str, Any]]:
        """The volumes of a prefix as the store knows them; `candidate`: a host of this name had it.

        Raises StoreError.
        """
        where = check_prefix(prefix or self._settings.prefixes[0])
        found = list_volumes(self._store.view("read", VERB_PATIENCE), where)
        served = {entry.record.volume_id.hex() for entry in self.table.all() if entry.record is not None}
        return [
            {
                **asdict(volume),
                "served_here": volume.volume_id in served,
                "candidate": volume.is_candidate(self._settings.owner),
            }
            for volume in found
        ]

    def _attach_again(self, entry: Entry, wanted: AttachRequest) -> ExportStatus:
        with entry.lock:
            self.table.check_open()
            if entry.gone:
                raise UnknownExport(entry.name)
            if wanted.take_over and entry.volume is not None and entry.serves():
                with contextlib.suppress(Fenced):  # the caller may know what this host has not heard yet
                    self._lineage.confirm(entry.volume)
            if entry.serves() and not wanted.accept_older:
                return entry.status()
            record = entry.record
            if record is None:
                self._attach(entry, self._prefix_of(entry.name, wanted.prefix), wanted)
                return entry.served_status()
            if wanted.take_over and not wanted.accept_older:
                self._opener.roots.check_not_older(record)
            if entry.is_fenced():
                self._attach_fenced(entry, record, wanted)
            elif wanted.take_over or wanted.accept_older:
                self._opener.close_entry(entry, remove_device=True)
                self._opener.logs.set_aside(record)
                self._attach(entry, record.prefix, wanted)
            else:
                self._opener.close_entry(entry, remove_device=False)
                self._opener.reopen(entry)
            return entry.served_status()

    def _prefix_of(self, name: str, wanted: str | None) -> str:
        """Where the volume of a lost record is. Raises StoreError."""
        view = self._store.view("upload", VERB_PATIENCE)
        for prefix in self._settings.prefixes if wanted is None else ():
            with contextlib.suppress(UnknownExport):
                lease.read_root(view, prefix, name)
                return prefix
        return check_prefix(wanted or self._settings.prefixes[0])

    def _attach_fenced(self, entry: Entry, record: ExportRecord, wanted: AttachRequest) -> None:
        """Take the volume again with a new log; the fenced one is set aside.

        If the store refuses, the export stays as it is.
        """
        root, etag = self._lease(record.prefix, entry.name, wanted)
        self._opener.close_entry(entry, remove_device=True)
        self._opener.logs.set_aside(record)
        self._take(entry, record.prefix, root, etag, wanted)

    # -- resize --------------------------------------------------------------------------------

    def resize(self, name: str, size: int | str, *, shrink: bool = False) -> ExportStatus:
        """Change the size of a served volume. A smaller one needs `shrink`; what it cuts off is lost."""
        self.check_changes()
        with self.table.locked(name) as entry:
            entry.check_served()
            record, volume, transport = entry.record, entry.volume, entry.transport
            assert record is not None
            assert volume is not None
            assert transport is not None
            wanted = normal_size(size, record.size)
            if wanted == record.size:  # its guests may not know, if that failed
                note = transport.resize(self._opener.guests.attachment(entry))
                return entry.status(note=note or f"{name} had that size already; '+{size}' would add it")
            if record.read_only:  # of a view as of an own volume
                raise NotSupported(f"{name} is read-only; its size cannot change")
            if wanted < record.size and not shrink:
                raise ConfigError(
                    f"{name} has {record.size} bytes, {wanted} would cut data off; confirm it with --shrink"
                )
            before = self._opener.guests.attachment(entry)
            transport.check_resize(before, wanted)
            after = replace(before, size=wanted)
            note = transport.resize(after) if wanted < record.size else ""
            try:
                volume.resize(wanted)
            except BaseException:
                transport.resize(before)
                raise
            entry.change_record(self._records, size=wanted)
            if wanted > record.size:
                note = transport.resize(after)
            return entry.status(note=note)

    def change_transport(self, name: str, kind: str) -> ExportStatus:
        """Serve it by another transport; see :meth:`Leaving.change_transport`."""
        self.check_changes()
        return self._leaving.change_transport(name, kind)

    # -- drain, detach, remove -----------------------------------------------------------------

    def drain(self, name: str, timeout: float | None = None) -> ExportStatus:
        """Upload everything acknowledged before the call. Raises DrainTimeout when time is up.

        It may wait as long as an outage lasts, so it holds no lock: other verbs go on.
        """
        entry = self.table.get(name)
        entry.drain(timeout)
        return entry.status()

    def detach(self, name: str, timeout: float | None = None, *, force: bool = False) -> dict[str, Any]:
        """Stop serving, upload everything, give the volume up; see :meth:`Leaving.detach`."""
        self.check_changes()
        return self._leaving.detach(name, timeout, force=force)

    def remove(
        self, name: str, *, purge: bool = False, force: bool = False, now: bool = False
    ) -> dict[str, Any]:
        """Delete the volume here and in the store; see :meth:`Leaving.remove`."""
        self.check_changes()
        return self._leaving.remove(name, purge=purge, force=force, now=now)

    def undelete(self, name: str, prefix: str | None = None) -> dict[str, Any]:
        """Put a removed volume back into the store; see :meth:`Leaving.undelete`."""
        self.check_changes()
        return self._leaving.undelete(name, check_prefix(prefix or self._settings.prefixes[0]))
