"""The export record: what a host knows about an export it serves, without asking the store.

One JSON file per export, so that an operator can read it:

    {"checksum": BLAKE3 in hex of the bytes of the value of "record", "record": {...}}

Ids and hashes are hex. The file is replaced atomically and durably; a fork is served once its
record is on disk, and lives by the record alone until its root has been put.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import msgspec
from blake3 import blake3
from msgspec import Meta

from glidefs.errors import CorruptObject, NewerFormat
from glidefs.formats.atomic import read_file, write_file_atomic
from glidefs.formats.manifest import MAX_SIZE, Id, Label, Natural
from glidefs.names import NAME_PATTERN

VERSION = 2
MAX_ROOT = 64 << 20
"""Bytes of the largest encoded root that a record holds."""
MAX_RECORD = 2 * MAX_ROOT + (1 << 20)
"""Bytes of the largest record file that is read."""

_BYTES_FIELDS = ("volume_id", "log_id", "manifest_hash", "root")


class ExportRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An export of this host.

    ``volume_id`` and ``log_id`` 16 bytes, ``manifest_hash`` (32 bytes) of the root that the local
    copies must have, ``size`` in bytes. ``attached``: the export is to be served at start.
    ``device_id``: the number of the device to keep, if any; ``served_by``: the transport that it had
    last, which "auto" stays with. ``root_published``: the store has had a root of
    this volume, so one that is missing there fences the export. Until then ``root`` is that root as it
    will be put, encoded: so one file makes a new volume durable. ``fenced``: why this host may not serve
    the volume any more, empty while it may; ``fenced_at``: since when, unix seconds. A fence is final for
    this ``log_id``: a volume that is taken again has a new log, and a new record.
    """

    name: Annotated[str, Meta(pattern=NAME_PATTERN)]
    volume_id: Id
    log_id: Id
    prefix: Annotated[str, Meta(pattern=NAME_PATTERN)]
    manifest_hash: Annotated[bytes, Meta(min_length=32, max_length=32)]
    size: Annotated[int, Meta(gt=0, le=MAX_SIZE, multiple_of=512)]
    version: int = VERSION
    transport: Label = "auto"
    read_only: bool = False
    flush: Literal["local", "store"] = "local"
    attached: bool = True
    device_id: Natural | None = None
    served_by: Label = ""
    root_published: bool = False
    root: Annotated[bytes, Meta(max_length=MAX_ROOT)] = b""
    source: Label = ""
    epoch: Natural = 0
    created_at: Natural = 0
    fenced: Label = ""
    fenced_at: Natural = 0

    @property
    def is_view(self) -> bool:
        """Whether it only shows a base or snapshot: then it has no root in the store, and owns nothing."""
        return self.read_only and bool(self.source) and not self.root_published


class _File(msgspec.Struct):
    checksum: str
    record: msgspec.Raw


_file_decoder = msgspec.json.Decoder(_File)


def encode_record(record: ExportRecord) -> bytes:
    """The bytes of a record file. Raises ValueError for a record that would not decode to itself."""
    fields: dict[str, Any] = msgspec.structs.asdict(record)
    for field in _BYTES_FIELDS:
        fields[field] = fields[field].hex()
    body = msgspec.json.encode(fields)
    if _parse(body) != record:
        raise ValueError("the export record does not decode to itself")
    document = _File(checksum=blake3(body).hexdigest(), record=msgspec.Raw(body))
    return msgspec.json.encode(document) + b"\n"


class _OtherVersion(ValueError):
    """The record is whole, but of another version."""


def _other_version(version: object) -> str:
    if isinstance(version, int) and 0 < version < VERSION:
        return (
            f"version {version} is that of an older GlideFS, this one reads version {VERSION}; "
            "detach the volume with the older one, then attach it here"
        )
    return f"version {version!r} is not known here; a newer GlideFS wrote it"


def _parse(body: bytes | msgspec.Raw) -> ExportRecord:
    fields = msgspec.json.decode(body, type=dict[str, Any])
    version = fields.get("version")
    if version != VERSION:
        raise _OtherVersion(_other_version(version))
    for field in _BYTES_FIELDS:
        fields[field] = bytes.fromhex(fields.get(field, ""))
    return msgspec.convert(fields, ExportRecord)


def decode_record(key: str, data: bytes) -> ExportRecord:
    """The record in the bytes of a file; ``key`` names it in errors.

    Raises CorruptObject; of these NewerFormat for a record of another version.
    """
    try:
        document = _file_decoder.decode(data)
        body = bytes(document.record)
        if blake3(body).hexdigest() != document.checksum:
            raise ValueError("checksum does not match")
        return _parse(body)
    except _OtherVersion as error:
        raise NewerFormat(key, 0, f"export record: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptObject(key, 0, f"export record: {error}") from error


def save(path: str | os.PathLike[str], record: ExportRecord) -> None:
    """Replace the record file atomically; durable on return. Raises OSError."""
    write_file_atomic(path, encode_record(record))


def load(path: str | os.PathLike[str]) -> ExportRecord:
    """Read a record file. Raises FileNotFoundError, OSError or CorruptObject."""
    return decode_record(os.fspath(path), read_file(path, MAX_RECORD))
