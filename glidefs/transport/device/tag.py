"""Whose a ublk device is: 64 bits that the kernel keeps beside it (`ublksrv_flags`).

The upper half names the cache directory of the daemon that made the device, by 16 random bytes in a file of
that directory and by its path; the lower half names the export. So a device is known as one of this
cache directory also when the record of its export is gone, and not taken for one of another daemon that
has the same path, in a container for instance. Neither half is ever 0, which is what other programs
leave there.
"""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path

from blake3 import blake3

from glidefs.errors import CorruptObject
from glidefs.formats.atomic import write_file_atomic

OWNER_FILE = "device-owner"
"""In the state directory: 16 random bytes as hex digits, made once."""
_HALF = 32


class DeviceTags:
    """The tags of one cache directory. ``state_dir`` is its state directory.

    ``owner`` are the bytes of its file; None where it has none yet: then no device is of this directory.
    ``is_new``: they were drawn just now, so that older devices of the directory cannot have them.
    """

    def __init__(self, state_dir: Path, owner: bytes | None, is_new: bool = False) -> None:
        self._place = str(state_dir.resolve()).encode()
        self._owner = None if owner is None else _half(b"owner", self._place, owner)
        self._is_new = is_new

    @property
    def has_owner(self) -> bool:
        """Whether the directory has its bytes: a daemon with ublk ran in it."""
        return self._owner is not None

    def tag(self, name: str, volume_id: bytes) -> int:
        """The tag of a new device for this export."""
        if self._owner is None:
            raise ValueError("a directory without an owner file makes no devices")
        return self._owner << _HALF | self._export(name, volume_id)

    def accepts(self, tag: int, name: str, volume_id: bytes) -> bool:
        """Whether a device with this tag is this export's, whose record names it, of this directory."""
        if self._is_new and self.names(tag, name, volume_id):
            return True
        return tag in self.accepted(name, volume_id)

    def accepted(self, name: str, volume_id: bytes) -> list[int]:
        """The tags that devices of this export in this directory have."""
        own = [] if self._owner is None else [self.tag(name, volume_id)]
        return [*own, self._first_version(name, volume_id)]

    def names(self, tag: int, name: str, volume_id: bytes) -> bool:
        """The same for this path, even if another directory was there: its disk was lost."""
        lower = tag & ((1 << _HALF) - 1)
        return tag == self._first_version(name, volume_id) or lower == self._export(name, volume_id)

    def is_ours(self, tag: int) -> bool:
        """Whether the device was made by a daemon of this directory, for whatever export."""
        return self._owner is not None and tag >> _HALF == self._owner

    def _export(self, name: str, volume_id: bytes) -> int:
        return _half(b"export", self._place, name.encode(), volume_id)

    def _first_version(self, name: str, volume_id: bytes) -> int:
        """As it was before the halves: devices outlive an upgrade."""
        text = b"\0".join((self._place, name.encode(), volume_id))
        return int.from_bytes(blake3(text).digest(length=8), "little") or 1


def _half(*parts: bytes) -> int:
    return int.from_bytes(blake3(b"\0".join(parts)).digest(length=_HALF // 8), "little") or 1


def load_tags(state_dir: Path) -> DeviceTags:
    """The tags of a cache directory, without writing anything. Raises CorruptObject, OSError."""
    path = state_dir / OWNER_FILE
    try:
        text = path.read_text(encoding="ascii").strip()
        owner = bytes.fromhex(text)
    except FileNotFoundError:
        return DeviceTags(state_dir, None)
    except ValueError:
        owner = b""
    if len(owner) != 16:
        raise CorruptObject(str(path), 0, "not 32 hex digits")
    return DeviceTags(state_dir, owner)


def make_tags(state_dir: Path) -> DeviceTags:
    """The same for a daemon, which has the directory to itself: makes the file where it is not there.

    Raises OSError.
    """
    with contextlib.suppress(CorruptObject):
        tags = load_tags(state_dir)
        if tags.has_owner:
            return tags
    owner = secrets.token_bytes(16)
    write_file_atomic(state_dir / OWNER_FILE, f"{owner.hex()}\n".encode())
    return DeviceTags(state_dir, owner, is_new=True)
