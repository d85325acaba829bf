"""Recovery from local files that are damaged, outdated or missing.

Exports whose record is lost, though their write log is here:

What such an export was is in other places: the name of the record's file, the local copy of the root, and
the store's root, which names the log. So it is listed with the verb that takes it up, and that verb replays
the log where the root names it: what a log holds is set aside only when that is asked for.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
from pathlib import Path

from glidefs.core.gather import log_segments
from glidefs.errors import GlideError
from glidefs.formats.export_record import ExportRecord
from glidefs.formats.manifest import Root
from glidefs.manifest import lease, local
from glidefs.store.base import ObjectStore
from glidefs.volume import aside, logs

log = logging.getLogger(__name__)


def has_unsent(logs_dir: Path, root: Root) -> bool:
    """Whether the log that ``root`` names is here, not set aside, and has what ``root`` does not include."""
    directory = logs.log_dir(logs_dir, root.volume_id, root.log_id)
    return not aside.is_noted(directory) and any(seq > root.last_segment for seq in log_segments(directory))


def advice(name: str, what: str) -> str:
    """What is said about an export whose record is lost."""
    return f"{what}; 'glidefs attach {name}' makes it again from the store's root, and replays its write log"


def find_lost(
    state_dir: Path, logs_dir: Path, records: Collection[ExportRecord], known: Collection[str]
) -> dict[str, str]:
    """Volumes with unsent writes here that no record names: name, and why it is not served.

    ``known`` are the names of all records, damaged ones too. The roots of volumes that have one are not read:
    there may be thousands.
    """
    lost: dict[str, str] = {}
    for root in local.every(state_dir, but={record.volume_id for record in records}):
        if root.name not in known and not root.read_only and has_unsent(logs_dir, root):
            lost[root.name] = advice(root.name, "its record is lost, and its write log holds unsent writes")
    return lost


def look_at_nameless(
    state_dir: Path, logs_dir: Path, records: Collection[ExportRecord], *, remove: bool
) -> None:
    """Report logs with data that no record and no local root names.

    A fork that the store does not know yet leaves one if it loses its record. With ``remove``, where every
    record is known, empty log directories are deleted: a crash before the record of a new export leaves one.
    """
    named = {(record.volume_id, record.log_id) for record in records}
    for volume_id, log_id in logs.log_ids(logs_dir):
        if (volume_id, log_id) in named:
            continue
        root = local.find(state_dir, volume_id)
        if root is not None and root.log_id == log_id:
            continue
        found = logs.log_info(logs_dir, volume_id, log_id, live=False)
        path = Path(found.path)
        if found.segments and not aside.is_noted(path):
            log.error(
                "%s: a write log whose record is lost, and nothing here says which export it belonged to; "
                "'glidefs logs export %s %s FILE' saves what it holds, 'glidefs logs delete' deletes it",
                found.path,
                found.volume_id,
                found.log_id,
            )
        elif remove and not logs.has_witness(path):
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
                path.parent.rmdir()


def newer_root(
    store: ObjectStore, record: ExportRecord, root: Root, tried: Collection[bytes]
) -> tuple[Root, str] | None:
    """The store's root with its ETag if it is ahead of ``root``, a local copy that is old, and was put here.

    ``tried`` are the nonces of what was put; a root with another nonce was put by a copy of this host.
    """
    try:
        found, etag = lease.read_root(store, record.prefix, record.name)
    except GlideError:
        return None
    ours = found.volume_id == record.volume_id and found.log_id == record.log_id
    return (found, etag) if ours and found.sequence > root.sequence and found.nonce in tried else None
