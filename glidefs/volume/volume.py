"""A volume that this host serves: the core's handle, the manifest in use, and its state for people."""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from glidefs.asked import check_listening
from glidefs.core.check import Closed
from glidefs.core.figures import VolumeInfo
from glidefs.core.gather import Gather
from glidefs.core.volume import CoreVolume
from glidefs.errors import Fenced, GlideError, StoreWentBack
from glidefs.events import happened
from glidefs.formats.export_record import ExportRecord
from glidefs.formats.manifest import Root
from glidefs.manifest.cache import MetaCache
from glidefs.manifest.commit import Committer
from glidefs.manifest.view import Manifest
from glidefs.store.base import ObjectStore

log = logging.getLogger(__name__)

_making_conditions = threading.Lock()


class DrainTimeout(GlideError):
    """A drain did not end before its deadline; its data stays in the local log, and the upload goes on."""

    temporary = True


class VolumeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A volume now. Bytes and seconds; ``fenced`` and ``last_error`` are texts, empty if all is well."""

    name: str
    size: int
    dirty_bytes: int
    oldest_dirty_seconds: float
    log_bytes: int
    map_bytes: int
    committed_segment: int
    last_segment: int
    sequence: int
    parked: int
    longest_wait_seconds: float
    connections: int
    published: bool
    fenced: str
    failed: int
    last_error: str


class Volume:
    """Made by :meth:`glidefs.host.host.Host.open`. Thread-safe.

    ``upload(volume)`` asks for all of it to be sealed and uploaded now, ``forget(volume)`` ends what threads
    do with it.
    ``on_fenced(volume, why)`` is called once when another host turns out to have the volume,
    ``on_published(volume)`` when the store has its first root. Both run on threads of the host.
    """

    __slots__ = (
        "__weakref__",
        "_awaited",
        "_changed",
        "_closing",
        "_forget",
        "_size_dirty",
        "_upload",
        "committer",
        "compact_state",
        "cookie",
        "core",
        "done_segment",
        "fenced",
        "last_error",
        "log_path",
        "manifest",
        "name",
        "on_fault",
        "on_fenced",
        "on_published",
        "opened_at",
        "prefix",
        "record",
        "size",
        "went_back",
    )

    def __init__(
        self,
        record: ExportRecord,
        root: Root,
        etag: str | None,
        cookie: int,
        *,
        meta: MetaCache,
        state_dir: Path,
        log_path: str,
        upload: Callable[[Volume], None],
        forget: Callable[[Volume], None],
    ) -> None:
        self._upload = upload
        self._forget = forget
        self.record = record
        self.cookie = cookie
        self.name = record.name
        self.prefix = record.prefix
        self.size = record.size
        self.log_path = log_path
        self.core: CoreVolume
        self.done_segment = root.last_segment
        """The last segment that the store has, or that held nothing to upload."""
        self.fenced = ""
        self.last_error = ""
        self.went_back: StoreWentBack | None = None
        """Why nothing is committed until an operator has decided; nobody waits for that. It ends when the
        store was asked again."""
        self.opened_at = time.time()
        self.on_fenced: Callable[[Volume, str], None] | None = None
        self.on_published: Callable[[Volume], None] | None = None
        self.on_fault: Callable[[int, int], None] | None = None
        """Called with (first block, count) of each fault, for a boot profile."""
        self.compact_state: Any = None
        self._size_dirty = False
        self._closing = False
        self._awaited = 0
        # One condition for the host would wake every drain on every commit; this is made on demand.
        self._changed: threading.Condition | None = None
        self.committer = Committer(
            root,
            etag,
            prefix=record.prefix,
            meta=meta,
            state_dir=state_dir,
            on_change=self._root_changed,
            gather=lambda first, last: Gather(self.core, self.log_path, self.id, self.log_id, first, last),
        )
        self.manifest: Callable[[ObjectStore], Manifest] = self.committer.manifest
        """The manifest in use now, loading pages through a store."""

    # -- identity and manifest -------------------------------------------------------------------

    @property
    def log_dir(self) -> Path:
        """Where its log is."""
        return Path(self.log_path)

    @property
    def id(self) -> bytes:
        """The volume id, 16 bytes."""
        return self.record.volume_id

    @property
    def log_id(self) -> bytes:
        """The log id, 16 bytes: the fencing token."""
        return self.record.log_id

    @property
    def root(self) -> Root:
        """The manifest root in use now."""
        return self.committer.root

    @property
    def etag(self) -> str | None:
        """The ETag of that root in the store, None before its first put."""
        return self.committer.etag

    @property
    def closing(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closing

    @property
    def profiling(self) -> bool:
        """Whether its faults are being recorded: then only they may make blocks resident."""
        return self.on_fault is not None

    @property
    def read_only(self) -> bool:
        """Whether the volume takes no writes, and so owns nothing in the store."""
        return self.record.read_only

    # -- for the people who use it ---------------------------------------------------------------

    def drain(self, deadline: float | None = None) -> None:
        """Return when the store has everything that was acknowledged before the call.

        ``deadline`` in seconds from now. Raises DrainTimeout, Abandoned, Fenced, Closed, StoreWentBack.
        """
        if self.read_only:
            return
        self._check_fenced()
        known = self.went_back  # to be looked at again
        target = self.core.seal()
        with _making_conditions:
            if self._changed is None:
                self._changed = threading.Condition()
        with self._changed:
            self._awaited += 1
        try:
            self._upload(self)
            self._wait_drained(self._changed, target, deadline, known)
        finally:
            with self._changed:
                self._awaited -= 1

    def _wait_drained(
        self, changed: threading.Condition, target: int, deadline: float | None, known: StoreWentBack | None
    ) -> None:
        until = None if deadline is None else time.monotonic() + deadline
        with changed:
            while self.went_back is not None or not self.drained(target):
                self._check_fenced()
                if self.went_back is not None and self.went_back is not known:
                    raise self.went_back
                check_listening(f"the drain of {self.name}")
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    why = f": {self.last_error}" if self.last_error else ""
                    raise DrainTimeout(f"volume {self.name}: not drained within {deadline:g} s{why}")
                # Woken by commits; the timeout looks at close, at who waits, and at a lost wake-up.
                changed.wait(1.0 if left is None else min(left, 1.0))
                if self.core.closed:
                    raise Closed(f"volume {self.name} was closed while it drained")

    @property
    def awaited(self) -> bool:
        """Whether a drain waits for the upload."""
        return self._awaited > 0

    def drained(self, segment: int) -> bool:
        """Whether the store has all segments up to ``segment``, and a root that says all."""
        committer = self.committer
        return committer.published and not self.root_lags and self.done_segment >= segment

    def resize(self, size: int) -> None:
        """Change the size, in bytes; commits it in the background. Raises Fenced, CoreError."""
        self._check_fenced()
        self.core.resize(size)
        self.size = size
        self.record = msgspec.structs.replace(self.record, size=size)
        self._size_dirty = True
        if not self.read_only:
            self._upload(self)

    def prefer(self, transport: str) -> None:
        """Whoever opens the volume next, on any host, shall use this transport unless told otherwise.

        The root says so with the next commit, which this asks for.
        """
        self.record = msgspec.structs.replace(self.record, transport=transport)
        if not self.read_only:
            self._upload(self)

    def retire_committed(self) -> None:
        """Give back the log space of all that the store has; later reads come from the store."""
        # A commit makes its local copy durable first, and tells the core then.
        segment = min(self.retirable(), self.core.info().committed_seq)
        if segment:
            self.core.retire(segment)

    def retirable(self) -> int:
        """The last segment that may be retired: the durable local manifest includes it."""
        return self.committer.local_segment

    def mark_done(self, segment: int) -> None:
        """The store has all segments up to ``segment``: flushes that wait return."""
        if segment > self.done_segment:
            self.done_segment = segment
        if segment:
            self.core.committed(segment)
        self._notify()

    def status(self, info: VolumeInfo | None = None) -> VolumeStatus:
        """State for people and metrics, with what the core has just told if it was asked. Raises Closed."""
        info = self.core.info() if info is None else info
        return VolumeStatus(
            name=self.name,
            size=info.size,
            dirty_bytes=info.dirty_bytes,
            oldest_dirty_seconds=info.dirty_age,
            log_bytes=info.log_bytes,
            map_bytes=info.map_bytes,
            committed_segment=info.committed_seq,
            last_segment=info.last_seq,
            sequence=self.root.sequence,
            parked=info.parked,
            longest_wait_seconds=round(info.longest_wait_ns / 1e9, 3),
            connections=info.connections,
            published=self.committer.published,
            fenced=self.fenced,
            failed=info.failed,
            last_error=self.last_error,
        )

    def close(self) -> None:
        """Stop serving here. The log stays; nothing is uploaded (see :meth:`drain`)."""
        self._closing = True
        self._forget(self)
        self.core.close()
        self._notify()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- for the host's threads ------------------------------------------------------------------

    @property
    def root_lags(self) -> bool:
        """Whether the root in use has not the volume's size or transport yet."""
        return self._size_dirty or (not self.read_only and self.record.transport != self.root.transport)

    def size_changed(self) -> None:
        """Look whether the manifest still has the volume's size."""
        self._size_dirty = self.size != self.root.size

    def size_committed(self, size: int) -> None:
        """A commit carried ``size``."""
        if size == self.size:
            self._size_dirty = False
        self._notify()

    def fence(self, why: str) -> None:
        """Another host has the volume: fail all I/O, keep the log, say so once."""
        if self.fenced:
            return
        with contextlib.suppress(Closed):
            self.core.fail(errno.EIO)
        self.fenced = why  # whoever sees it finds that I/O fails
        if self.on_fenced is not None:
            self.on_fenced(self, why)  # makes it durable: then it is said
        text = f"volume {self.name} is FENCED: {why}; I/O fails now, its log stays in {self.log_dir}"
        happened("fence", text, export=self.name, volume_id=self.id.hex(), level=logging.ERROR)
        self._notify()

    def _check_fenced(self) -> None:
        if self.fenced:
            raise Fenced(self.name, self.fenced)

    def _root_changed(self) -> None:
        if self.committer.published and not self.record.root_published:
            self.record = msgspec.structs.replace(self.record, root_published=True)
            if self.on_published is not None:
                self.on_published(self)
        with contextlib.suppress(Closed):  # the commit stands; the log is not served any more
            self.mark_done(self.root.last_segment)

    def _notify(self) -> None:
        changed = self._changed
        if changed is not None:
            with changed:
                changed.notify_all()
