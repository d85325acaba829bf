"""The note beside a write log that was set aside: whose it was, why, and how much of it is in the store.

A small file in the log's directory, written when its export loses the log: it outlives the record and the
local root. A log without one, or with one that is damaged, counts as if the store had nothing of it.

    {"checksum": BLAKE3 in hex of the bytes of the value of "aside", "aside": {...}}
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from blake3 import blake3

from glidefs.errors import CorruptObject
from glidefs.formats.atomic import read_file, write_file_atomic

FILE = "aside.json"
UNKNOWN = -1
_MAX_FILE = 64 << 10


class Aside(msgspec.Struct, frozen=True, kw_only=True):
    """``name`` and ``prefix`` of the export; ``at``: unix seconds; ``sent``: last segment in the store.

    ``sent`` is UNKNOWN if nothing says it.
    """

    name: str
    prefix: str
    why: str
    at: int
    sent: int


class _File(msgspec.Struct):
    checksum: str
    aside: msgspec.Raw


def sent_segment(noted: Aside | None) -> int | None:
    """The last segment in the store, None if nobody knows."""
    return noted.sent if noted is not None and noted.sent >= 0 else None


def write(directory: Path, aside: Aside) -> None:
    """Note it in a log's directory, unless that is not there. Durable on return. Raises OSError."""
    if not directory.is_dir():
        return
    body = msgspec.json.encode(aside)
    document = _File(checksum=blake3(body).hexdigest(), aside=msgspec.Raw(body))
    write_file_atomic(directory / FILE, msgspec.json.encode(document) + b"\n")


def is_noted(directory: Path) -> bool:
    """Whether the log was set aside, even if the note cannot be read any more: then it is not replayed."""
    return (directory / FILE).exists()


def read(directory: Path) -> Aside | None:
    """What was noted; None where nothing was, or it cannot be believed."""
    try:
        document = msgspec.json.decode(read_file(directory / FILE, _MAX_FILE), type=_File)
        body = bytes(document.aside)
        if blake3(body).hexdigest() != document.checksum:
            return None
        return msgspec.json.decode(body, type=Aside)
    except (OSError, ValueError, CorruptObject):
        return None
