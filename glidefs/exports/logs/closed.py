"""The write log of a closed export: how much of it the store lacks; setting it aside and deleting it."""

from __future__ import annotations

import errno
import logging
import time
from pathlib import Path

from glidefs.core.gather import Gather, log_segments
from glidefs.errors import CorruptObject, GlideError
from glidefs.exports.settings import RouterSettings
from glidefs.formats import atomic
from glidefs.formats.export_record import ExportRecord
from glidefs.formats.manifest import Root, decode_root
from glidefs.manifest import local
from glidefs.manifest.log_digest import LogDigest
from glidefs.names import manifest_key
from glidefs.volume import aside, logs

log = logging.getLogger(__name__)


class ExportLogs:
    """Logs by the records of their exports. The caller holds the entry's lock."""

    def __init__(self, places: RouterSettings) -> None:
        self._places = places

    def path(self, record: ExportRecord) -> str:
        """Where the log is."""
        return logs.log_path(self._places.logs_dir, record.volume_id, record.log_id)

    def directory(self, record: ExportRecord) -> Path:
        """The same."""
        return Path(self.path(record))

    def begin(self, record: ExportRecord) -> None:
        """Make the log's directory, durable on return. Raises OSError."""
        if not record.is_view:
            atomic.make_directory(self.directory(record))

    def is_own(self, root: Root) -> bool:
        """Whether the log that a root names is here, and was not set aside."""
        directory = logs.log_dir(self._places.logs_dir, root.volume_id, root.log_id)
        return directory.is_dir() and not aside.is_noted(directory)

    def put_here(self, root: Root, record: ExportRecord | None = None) -> bool | None:
        """Whether this host put a root that the store has, by its nonce; None if nothing here tells.

        That a log of the root's name is here is no evidence: a copy of this host has one, too. What it holds
        is, if the root was put while the disk took no nonce (see :class:`LogDigest`).
        """
        known = set(local.load_tried(self._places.state_dir, root.volume_id))
        saved = local.find(self._places.state_dir, root.volume_id)
        if saved is not None:
            known.add(saved.nonce)
        if record is not None and record.root:
            key = manifest_key(record.prefix, record.name)
            known.add(decode_root(key, record.root, f"record of {record.name}").nonce)
        if root.nonce in known or self._told_by_log(root, saved):
            return True
        return False if known else None

    def _told_by_log(self, root: Root, saved: Root | None) -> bool:
        """Whether ``root`` is made of the log that is here, behind the local copy of the root before it."""
        ids = root.volume_id, root.log_id
        directory = logs.log_dir(self._places.logs_dir, *ids)
        after = saved.last_segment if saved is not None and saved.log_id == root.log_id else 0
        digest = LogDigest(lambda first, last: Gather(None, directory, *ids, first, last))
        try:
            return digest.nonce(root, after, max(log_segments(directory), default=0)) == root.nonce
        except GlideError:
            return False

    def sent_segment(self, record: ExportRecord) -> int | None:
        """The last segment of the log that the store has; None if nothing here knows."""
        try:
            saved = self._saved(record)
        except CorruptObject:
            return None
        if saved is None:
            return None if record.root_published else 0
        return saved[0].last_segment if saved[0].log_id == record.log_id else None

    def _saved(self, record: ExportRecord) -> tuple[Root, str | None, bytes] | None:
        key = manifest_key(record.prefix, record.name)
        return local.load(self._places.state_dir, record.volume_id, key)

    def unsent_bytes(self, record: ExportRecord) -> int:
        """Bytes that the log holds and the store does not. Raises CorruptLog."""
        sent = self.sent_segment(record)
        return logs.unsent_bytes(self.directory(record), record.volume_id, record.log_id, sent)

    def set_aside(self, record: ExportRecord) -> None:
        """Note beside a log that leaves its export: whose it was, and how much of it the store has."""
        directory = self.directory(record)
        sent = self.sent_segment(record)
        note = aside.Aside(
            name=record.name,
            prefix=record.prefix,
            why=record.fenced,
            at=record.fenced_at or int(time.time()),
            sent=aside.UNKNOWN if sent is None else sent,
        )
        try:
            aside.write(directory, note)
        except OSError as error:
            log.warning("%s: nothing is noted beside its log in %s: %s", record.name, directory, error)

    def delete(self, record: ExportRecord) -> None:
        """Delete the log; others of the volume, which were set aside, stay."""
        directory = self.directory(record)
        logs.remove_log(directory)
        try:
            directory.parent.rmdir()  # fails where other logs of the volume were set aside
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                log.warning("%s: %s", directory.parent, error.strerror)
