"""From a record to a served export, and back: volumes are opened and closed, transports started.

At start every record is opened from local files alone, so that an outage of the store keeps nobody
from what is resident. What fails is listed with its reason; what may pass is tried again. A host
without records names the volumes that the store says a host of its name had, and takes none of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from msgspec.structs import replace

from glidefs.asked import START
from glidefs.core.handoff import Position
from glidefs.errors import (
    CorruptLog,
    Fenced,
    GlideError,
    NotSupported,
    OwnedElsewhere,
    StoreError,
    StoreWentBack,
)
from glidefs.events import event
from glidefs.exports.crew import Crew
from glidefs.exports.guests import Guests
from glidefs.exports.logs.closed import ExportLogs
from glidefs.exports.logs.lost_records import (
    advice,
    find_lost,
    has_unsent,
    look_at_nameless,
    newer_root,
)
from glidefs.exports.roots import STORE_PATIENCE, Found, Roots
from glidefs.exports.settings import RouterSettings
from glidefs.exports.table import Entry, ExportTable, RecordDirectory, new_record
from glidefs.formats.export_record import ExportRecord
from glidefs.formats.manifest import NO_ID, Root
from glidefs.host.host import Host
from glidefs.manifest import lease, local
from glidefs.manifest.lease import delete_root
from glidefs.names import manifest_key
from glidefs.store.resilient import ResilientStore
from glidefs.transport.base import Transport
from glidefs.volume.volume import Volume

log = logging.getLogger(__name__)

OPEN_THREADS = min(4, max(2, os.cpu_count() or 2))
"""At most, where exports wait for disks or the store: see :class:`Crew`."""
COMPARE_PATIENCE = 1.0
"""Seconds that the store has at a start to say whose a volume is, before guests are served."""
FIRST_RETRY, LAST_RETRY = 1.0, 30.0


class Opener:
    """Opens and closes entries. The caller of everything below `start` holds the entry's lock."""

    def __init__(
        self,
        table: ExportTable,
        records: RecordDirectory,
        host: Host,
        store: ResilientStore,
        transports: Mapping[str, Transport],
        places: RouterSettings,
        stopping: threading.Event,
    ) -> None:
        self._table = table
        self._records = records
        self._host = host
        self._store = store
        self.guests = Guests(transports, records, store)
        self.places = places
        self.logs = ExportLogs(places)
        self.roots = Roots(places, store, self.logs)
        self._stopping = stopping
        self.tried = threading.Event()
        self._abandoned = False
        self._thread: threading.Thread | None = None

    # -- start and background --------------------------------------------------------------------

    def load(self, *, standby: bool = False) -> list[Entry]:
        """List what the records name, while another process makes some or not; nothing is opened yet."""
        self._records.sync()
        local.sync_volumes(self.places.state_dir)
        records, damaged = self._records.load()
        places, known = self.places, {record.name for record in records} | set(damaged)
        lost = {name: advice(name, f"its record is damaged: {why}") for name, why in damaged.items()}
        lost |= find_lost(places.state_dir, places.logs_dir, records, known)
        for name, why in lost.items():
            entry = Entry(name)
            entry.failed(GlideError(why))
            self._table.add(entry)
            log.error("%s: not served: %s", name, why)
        remove = not standby and not damaged
        look_at_nameless(places.state_dir, places.logs_dir, records, remove=remove)
        entries = [Entry(record.name, record) for record in records]
        for entry in entries:
            entry.state = "fenced" if entry.is_fenced() else "starting"
            self._table.add(entry)
        return entries

    def start(self, entries: list[Entry]) -> None:
        """Open these on threads, and look after all of them from then on."""
        self._thread = threading.Thread(target=self._run, args=(entries,), name="exports", daemon=True)
        self._thread.start()

    def _run(self, entries: list[Entry]) -> None:
        self.roots.look(entry.record for entry in entries if entry.record is not None)
        Crew(self._open_recorded, OPEN_THREADS, "open-export").run(entries)
        self.roots.forget()
        self.tried.set()
        pause = FIRST_RETRY
        while not self._stopping.is_set():
            try:
                done = self._offered() and self._retry()
                pause = FIRST_RETRY if done else min(pause * 2, LAST_RETRY)
            except Exception:
                log.exception("exports could not be looked after; going on")
                pause = LAST_RETRY
            self._stopping.wait(LAST_RETRY if pause == FIRST_RETRY else pause)

    def _open_recorded(self, entry: Entry) -> None:
        with entry.lock:
            if entry.gone or self._stopping.is_set() or entry.serves() or self._table.is_shut:
                return
            try:
                finished = self._finish(entry)
            except Exception as error:
                self._failed(entry, error)
                return
            if finished:
                return
            if entry.is_fenced():
                self._stay_fenced(entry)
            else:
                self.reopen(entry)

    def _stay_fenced(self, entry: Entry) -> None:
        """Found fenced at a start, by its record."""
        entry.failed(Fenced(entry.name, entry.fence_reason()))
        self._end_fenced(entry)
        log.error(
            "%s: stays fenced: %s; 'glidefs attach %s' takes it again", entry.name, entry.reason, entry.name
        )

    def _end_fenced(self, entry: Entry) -> None:
        """Nothing serves it any more: guests of a device that is left get errors instead of waiting."""
        assert entry.record is not None
        self.guests.discard_device(entry.record)

    def _finish(self, entry: Entry) -> bool:
        """Finish a remove or detach that a crash interrupted; False if there is none, or nothing of it.

        Raises StoreError: what may not be ours any more is not served until the store has said so.
        """
        verb, record = self._records.intent(entry.name), entry.record
        if verb is None or record is None:
            return False
        if record.fenced:  # nothing in the store is ours any more
            self._finished(entry, record, verb, keep_log=True)
            return True
        view = self._store.view("background", STORE_PATIENCE)
        if verb == "remove":
            done = True
            ours = delete_root(view, record.prefix, record, partial(self.logs.put_here, record=record))
        else:
            done, ours = self.roots.given_up(record), True
        if not done:
            self._records.set_intent(entry.name, None)
            return False
        self._finished(entry, record, verb, keep_log=not ours)
        return True

    def _finished(self, entry: Entry, record: ExportRecord, verb: str, *, keep_log: bool) -> None:
        with event(verb, entry.name, record.volume_id.hex(), START) as what:
            self.forget(entry, keep_log=keep_log)
            self._table.drop(entry)
            what.detail = "it was interrupted"

    def _retry(self) -> bool:
        """Try again what failed for a reason that may pass; True if nothing is left."""
        for entry in self._table.all():
            if entry.unsaved:
                entry.save_again(self._records)
        waiting = [entry for entry in self._table.all() if entry.state == "failed" and entry.retry]
        for entry in waiting:
            self._open_recorded(entry)
        return not any(entry.state == "failed" and entry.retry and not entry.gone for entry in waiting)

    def _offered(self) -> bool:
        """Once per cache directory: say what a host of this name had. True when that is done."""
        if not self._records.scanned:
            if not self.roots.offer():
                return False
            self._records.mark_scanned()
        return True

    # -- one export ------------------------------------------------------------------------------

    def take(self, entry: Entry, prefix: str, root: Root, etag: str, transport: str) -> None:
        """Serve a volume that is ours in the store by now. A failure is kept in the entry."""
        local.save(self.places.state_dir, root, manifest_key(prefix, root.name), etag)
        self.begin(entry, new_record(root, prefix, transport, published=True))
        self.try_open(entry, root, etag)

    def take_lost(self, entry: Entry, prefix: str, transport: str) -> bool:
        """Serve a volume whose record was lost, from the log that its root names; False if there is none with
        unsent writes. A failure to open it is kept in the entry. Raises UnknownExport, StoreError, OSError.
        """
        name = entry.name
        root, etag = lease.read_root(self._store.view("upload", STORE_PATIENCE), prefix, name)
        ours = root.owner_host == self.places.owner.host and root.log_id != NO_ID
        if not ours or not has_unsent(self.places.logs_dir, root):
            return False
        self.roots.check_not_older(new_record(root, prefix, transport, published=True))
        if self.logs.put_here(root) is False:
            raise OwnedElsewhere(name, root.owner_node, lease.COPIED)
        log.warning("%s: its record was lost and is made again; log %s is replayed", name, root.log_id.hex())
        self.take(entry, prefix, root, etag, transport if transport != "auto" else root.transport)
        return True

    def open(self, entry: Entry, found: Found, *, compare: bool = False) -> None:
        """Open the volume and start the transport. Raises, and then neither is left.

        ``compare``: the root is a local copy, to be compared with the store's.
        """
        assert entry.record is not None
        entry.volume = self._host.open(entry.record, found.root, found.etag, copy=found.copy)
        self._watch(entry, entry.volume)
        try:
            if compare:
                self._compare(entry.volume)
            self.guests.start(entry)
        except BaseException:
            self.close_volume(entry)
            raise
        if entry.volume.committer.published:
            entry.published(self._records)  # before anybody listened

    def _compare(self, volume: Volume) -> None:
        """Before guests: whether the volume is still this host's. Raises Fenced.

        A store that does not answer at once keeps nobody waiting: then it is asked in the background.
        """
        if not volume.committer.published or volume.read_only or self._store.away:
            self._host.confirm(volume)
            return
        if self.roots.is_as_seen(volume):
            return
        try:
            volume.committer.poll(self._store.view("read", COMPARE_PATIENCE))
        except StoreError as error:
            if isinstance(error, StoreWentBack):
                volume.last_error, volume.went_back = str(error), error
                log.error("%s: served as it is here: %s", volume.name, error)
            self._host.confirm(volume)

    def prepare(self, entry: Entry) -> None:
        """Open the volume in standby: another process serves it until :meth:`take_up`. Raises."""
        assert entry.record is not None
        self.check_log(entry.record)
        found = self.roots.find(entry.record, alone=False)
        entry.volume = self._host.open(entry.record, found.root, found.etag, standby=True)
        self._watch(entry, entry.volume)
        self.guests.prepare(entry.record)

    def take_up(self, entry: Entry, position: Position) -> None:
        """The process before has stopped: bring the volume up to date; it stays frozen. Raises."""
        assert entry.volume is not None
        self._host.activate(entry.volume, position)

    def _watch(self, entry: Entry, volume: Volume) -> None:
        volume.on_fenced = lambda volume, why: self._fenced(entry, volume.log_id, why)
        volume.on_published = lambda volume: entry.published(self._records)

    def _fenced(self, entry: Entry, log_id: bytes, why: str) -> None:
        """Noted in the record, and beside the log, so that a log without its record is not replayed."""
        entry.fence(self._records, log_id, why)
        if entry.record is not None and entry.record.log_id == log_id:
            self.logs.set_aside(entry.record)

    def try_open(self, entry: Entry, root: Root, etag: str | None) -> None:
        """The same; a failure is kept in the entry."""
        try:
            self.open(entry, Found(root, etag))
        except Exception as error:
            self._failed(entry, error)

    def reopen(self, entry: Entry) -> None:
        """Serve from the record and the local root; from the store's where the local one is lost."""
        assert entry.record is not None
        try:
            self.check_log(entry.record)
            found = self.roots.find(entry.record)
            try:
                self.open(entry, found, compare=True)
            except CorruptLog as error:
                tried = local.load_tried(self.places.state_dir, found.root.volume_id)
                newer = newer_root(self._store.view("read", STORE_PATIENCE), entry.record, found.root, tried)
                if newer is None:
                    raise
                log.warning("%s: %s; but the local root is old, the store's is used", entry.name, error)
                self.open(entry, Found(*newer))
        except Exception as error:
            self._failed(entry, error)

    def reopen_after_failure(self, entry: Entry) -> None:
        """A remove or detach failed: go on serving, unless the store took it and only its answer was lost.

        While the store does not say which, nothing is served, as after a crash: see `_finish`.
        """
        assert entry.record is not None
        if entry.is_fenced():
            self._records.set_intent(entry.name, None)
            self._stay_fenced(entry)
            return
        try:
            given_up = self.roots.given_up(entry.record)
        except (GlideError, OSError) as error:
            self._failed(entry, error)
            entry.retry = True
            return
        if given_up:
            self.forget(entry)
            self._table.drop(entry)
            return
        self._records.set_intent(entry.name, None)
        self.reopen(entry)

    def _failed(self, entry: Entry, error: Exception) -> None:
        if isinstance(error, Fenced) and entry.record is not None:
            self._fenced(entry, entry.record.log_id, error.why)
        entry.failed(error)
        if entry.is_fenced():
            self._end_fenced(entry)
            return  # which is said
        unexpected = not isinstance(error, GlideError | OSError)
        log.error("%s: cannot be served: %s", entry.name, error, exc_info=error if unexpected else None)

    def begin(self, entry: Entry, record: ExportRecord) -> None:
        """A new life of an export. Its log is there before its record: one that is missing later was lost.

        Raises OSError.
        """
        self.logs.begin(record)
        with contextlib.suppress(NotSupported):  # asked for, and not to be had: the start says so
            record = replace(record, served_by=self.guests.choose(record.transport).kind)
        entry.set_record(self._records, record)

    def check_log(self, record: ExportRecord) -> None:
        """Raises GlideError where the log of an export is not here: it may hold what the store has not.

        A log that was begun in a directory without the mark is here: its volume was taken over again.
        """
        directory = self.logs.path(record)
        if record.is_view or os.path.isdir(directory):
            return
        why = f"{directory} is missing; put it back and start again"
        if self.places.logs_missing:
            where = self.places.logs_dir
            why = (
                f"the log directory {where}: {self.places.logs_missing}; mount the right disk and start again"
            )
        raise GlideError(
            f"{record.name}: its write log is not here: {why}; if it is lost, "
            f"'glidefs attach {record.name} --take-over'"
        )

    # -- transports ------------------------------------------------------------------------------

    def restart_transport(self, entry: Entry) -> None:
        """Serve again after a verb that failed. What fails is kept in the entry."""
        try:
            self.guests.start(entry)
        except Exception as error:
            self._failed(entry, error)

    def close_volume(self, entry: Entry) -> tuple[Root, str | None]:
        """Close the volume; returns its last root and that one's ETag."""
        volume = entry.volume
        if volume is None:
            raise GlideError(f"{entry.name} is not open")
        entry.volume = None
        volume.close()
        return volume.root, volume.etag

    def close_entry(self, entry: Entry, *, remove_device: bool) -> None:
        """Stop the transport and close the volume, as far as they are there."""
        self.guests.stop(entry, remove_device=remove_device)
        if entry.volume is not None:
            try:
                self.close_volume(entry)
            except (GlideError, OSError) as error:
                log.error("%s: %s", entry.name, error)

    def forget(self, entry: Entry, *, keep_log: bool = False) -> None:
        """Delete what this host keeps of an export that is closed, the record last.

        The log of a fenced volume is kept, always: it may hold writes that nobody else has.
        """
        record = entry.record
        if record is not None:
            self.guests.discard_device(record)
            if keep_log or record.fenced:
                self.logs.set_aside(record)
            else:
                self.logs.delete(record)
            local.forget(self.places.state_dir, record.volume_id)
        entry.delete_record(self._records)

    # -- the end ---------------------------------------------------------------------------------

    def let_go(self, remove_devices: bool) -> None:
        """The daemon stops: let guests go, sync logs, close volumes. Records stay."""
        with ThreadPoolExecutor(OPEN_THREADS * 2, "let-go") as pool:
            list(pool.map(lambda entry: self._let_go(entry, remove_devices), self._table.all()))

    def _let_go(self, entry: Entry, remove_device: bool) -> None:
        with entry.lock:
            self.guests.stop(entry, remove_device=remove_device)
            volume: Volume | None = entry.volume
            if volume is None:
                return
            try:
                volume.core.sync()
            except GlideError as error:
                log.error("%s: its log cannot be synced: %s", entry.name, error)
            self.close_entry(entry, remove_device=remove_device)

    def abandon(self) -> None:
        """Another process has the volumes, which are frozen: close them and touch nothing of theirs."""
        self._abandoned = True
        for entry in self._table.all():
            self.close_entry(entry, remove_device=False)

    def close(self) -> None:
        """End the background thread, close what is open."""
        if self._abandoned:
            return  # all is closed, and the thread ends: it may wait for a lock that the caller has
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for entry in self._table.all():
            with entry.lock:
                self.close_entry(entry, remove_device=False)
