"""Local copies of manifests: what a host knows of its volumes while the store is away.

``{state_dir}/volumes/{volume id}/`` holds ``root`` (MessagePack: the ETag or nil, and the bytes of the
encoded root, which carry their own checksum) and ``pages/{page id}``. The copy is durable before
segments that the root includes may be unlinked, so the local log and manifest together never lag
behind the store.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from glidefs.errors import CorruptObject
from glidefs.formats.atomic import fsync_dir, write_file_atomic
from glidefs.formats.manifest import Root, decode_root


class _Saved(msgspec.Struct, frozen=True, array_like=True):
    etag: str | None
    root: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Saved)


def volume_dir(state_dir: Path, volume_id: bytes) -> Path:
    """The directory of a volume's copies."""
    return state_dir / "volumes" / volume_id.hex()


def page_dir(state_dir: Path, volume_id: bytes) -> Path:
    """The directory of the copies of its pages."""
    return volume_dir(state_dir, volume_id) / "pages"


def save(
    state_dir: Path, volume_id: bytes, root: Root, data: bytes, etag: str | None, pages: Mapping[bytes, bytes]
) -> None:
    """Replace the copy by ``data`` (the encoded ``root``) and add encoded ``pages`` by id.

    Durable on return. Raises OSError, and then the old copy is whole.
    """
    directory = volume_dir(state_dir, volume_id)
    fresh = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    if fresh:
        fsync_dir(directory.parent)
        fsync_dir(directory.parent.parent)
    pages_at = directory / "pages"
    if pages:
        if not pages_at.exists():
            pages_at.mkdir()
            fsync_dir(directory)
        for page_id, page in pages.items():
            write_file_atomic(pages_at / page_id.hex(), page)
    write_file_atomic(directory / "root", _encoder.encode(_Saved(etag, data)))
    wanted = {page_id.hex() for page_id in root.page_ids}
    with contextlib.suppress(OSError):
        for path in pages_at.iterdir():
            if path.name not in wanted:
                path.unlink()


def sync(state_dir: Path, volume_id: bytes) -> None:
    """Make a copy that was found durable: the process that saved it may have died on the way. Raises OSError.

    Files are synced before they get their names, so it is the names that may be lost with the power.
    """
    with contextlib.suppress(FileNotFoundError):
        fsync_dir(page_dir(state_dir, volume_id))
    fsync_dir(volume_dir(state_dir, volume_id))


def sync_volumes(state_dir: Path) -> None:
    """The same for which volumes there are copies of: once for a start, not once for each. Raises OSError."""
    for place in (state_dir / "volumes", state_dir):
        with contextlib.suppress(FileNotFoundError):
            fsync_dir(place)


def load(state_dir: Path, volume_id: bytes) -> tuple[Root, str | None, bytes] | None:
    """The saved root, its ETag and its encoded bytes, or None. Raises CorruptObject."""
    path = volume_dir(state_dir, volume_id) / "root"
    try:
        saved = _decoder.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise CorruptObject(str(path), 0, f"local copy of a manifest: {error}") from error
    return decode_root(str(path), saved.root), saved.etag, saved.root


def forget(state_dir: Path, volume_id: bytes) -> None:
    """Delete the copies of a volume that was detached or removed."""
    shutil.rmtree(volume_dir(state_dir, volume_id), ignore_errors=True)
