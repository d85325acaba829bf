"""Names and the store keys made of them.

A name reaches a path or a key only through this module, which refuses what could escape from its place. Keys
are relative to the store's root url (``docs/formats.md``).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from glidefs.errors import ConfigError, InvalidName

# \Z, not $: the latter lets a trailing newline through.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z"

_NAME = re.compile(NAME_PATTERN)
_ID_HEX = re.compile(r"^[0-9a-f]{32}\Z")

MAX_SEQUENCE = 10**20 - 1
"""Largest snapshot sequence whose 20 digits still sort in order."""


def check_name(kind: str, name: str) -> str:
    """Return ``name`` if it is legal, else raise :class:`InvalidName`.

    ``kind`` says what is named (``"export"``, ``"base"``, ``"tag"``...), for the message.
    """
    if not isinstance(name, str) or not _NAME.match(name):
        raise InvalidName(kind, str(name))
    return name


def check_prefix(prefix: str) -> str:
    """Return the store prefix ``prefix`` if it is legal (the rule of names), else raise InvalidName."""
    return check_name("prefix", prefix)


def check_id(id_hex: str) -> str:
    """Return an object id of 32 lower-case hex digits, else raise :class:`InvalidName`."""
    if not _ID_HEX.match(id_hex):
        raise InvalidName("id", id_hex)
    return id_hex


def _id_key(prefix: str, kind: str, id_hex: str) -> str:
    check_id(id_hex)
    return f"{check_prefix(prefix)}/{kind}/{id_hex[:2]}/{id_hex}"


def pack_key(prefix: str, id_hex: str) -> str:
    """Key of a pack; ``id_hex`` is 32 hex digits."""
    return _id_key(prefix, "packs", id_hex)


def page_key(prefix: str, id_hex: str) -> str:
    """Key of a manifest page; ``id_hex`` is 32 hex digits."""
    return _id_key(prefix, "pages", id_hex)


def manifest_key(prefix: str, name: str) -> str:
    """Key of the manifest root of volume ``name``."""
    return f"{volumes_prefix(prefix)}{check_name('volume', name)}/manifest"


def snapshot_sequence(key: str) -> int | None:
    """The sequence of the snapshot under a key of :func:`snapshots_prefix`; None for another object."""
    last = key.rsplit("/", 1)[-1]
    good = len(last) == len(str(MAX_SEQUENCE)) and last.isascii() and last.isdigit()
    return int(last) if good else None


def snapshot_key(prefix: str, name: str, seq: int) -> str:
    """Key of snapshot ``seq`` (0 or more) of volume ``name``; keys sort by sequence."""
    if not 0 <= seq <= MAX_SEQUENCE:
        raise InvalidName("snapshot sequence", str(seq))
    return f"{snapshots_prefix(prefix, name)}{seq:020}"


def base_manifest_key(prefix: str, base: str) -> str:
    """Key of the write-once manifest of a base."""
    return f"{bases_prefix(prefix)}{check_name('base', base)}/manifest"


def hot_set_key(prefix: str, base: str) -> str:
    """Key of the hot set of a base."""
    return f"{bases_prefix(prefix)}{check_name('base', base)}/hot-set"


def blessing_key(prefix: str, base: str) -> str:
    """Key of the checkpoint of a bless under way: what is in the store already of a base to be."""
    return f"{bases_prefix(prefix)}{check_name('base', base)}/blessing"


def tag_key(prefix: str, tag: str) -> str:
    """Key of the manifest copy named ``tag``."""
    return f"{tags_prefix(prefix)}{check_name('tag', tag)}"


def pin_key(prefix: str, id_hex: str) -> str:
    """Key of a pin; no tag has such a name."""
    return f"{pins_prefix(prefix)}{check_id(id_hex)}"


def gc_state_key(prefix: str) -> str:
    """Key of what one run of gc leaves for the next."""
    return f"{check_prefix(prefix)}/gc/state"


def gc_clock_key(prefix: str) -> str:
    """Key of the object that is put to read the store's clock."""
    return f"{check_prefix(prefix)}/gc/clock"


def packs_prefix(prefix: str) -> str:
    """Where the packs of a prefix are, with the trailing slash that listings want."""
    return f"{check_prefix(prefix)}/packs/"


def pages_prefix(prefix: str) -> str:
    """Where the manifest pages of a prefix are."""
    return f"{check_prefix(prefix)}/pages/"


def volumes_prefix(prefix: str) -> str:
    """Where the volumes of a prefix are."""
    return f"{check_prefix(prefix)}/volumes/"


def snapshots_prefix(prefix: str, name: str) -> str:
    """Where the snapshots of volume ``name`` are."""
    return f"{volumes_prefix(prefix)}{check_name('volume', name)}/snapshots/"


def bases_prefix(prefix: str) -> str:
    """Where the bases of a prefix are."""
    return f"{check_prefix(prefix)}/bases/"


def tags_prefix(prefix: str) -> str:
    """Where the tags of a prefix are."""
    return f"{check_prefix(prefix)}/tags/"


def pins_prefix(prefix: str) -> str:
    """What the keys of pins begin with."""
    return f"{tags_prefix(prefix)}.pin-"


class Source(NamedTuple):
    """What a fork, an image or a base is made from. ``sequence`` is a snapshot's."""

    kind: Literal["volume", "snapshot", "base", "tag"]
    name: str
    sequence: int = 0

    def key(self, prefix: str) -> str:
        """Key of its manifest root. Raises InvalidName."""
        if self.kind == "volume":
            return manifest_key(prefix, self.name)
        if self.kind == "base":
            return base_manifest_key(prefix, self.name)
        if self.kind == "tag":
            return tag_key(prefix, self.name)
        return snapshot_key(prefix, self.name, self.sequence)

    def __str__(self) -> str:
        at = f"@{self.sequence}" if self.kind == "snapshot" else ""
        return f"{self.kind}:{self.name}{at}"


def parse_source(text: str) -> Source:
    """NAME, volume:NAME, NAME@SEQ, snapshot:NAME@SEQ, base:NAME or tag:NAME.

    Raises ConfigError, InvalidName.
    """
    kind, colon, name = text.partition(":")
    if not colon:
        kind, name = ("snapshot" if "@" in text else "volume"), text
    if kind == "volume":
        return Source("volume", check_name("volume", name))
    if kind == "base":
        return Source("base", check_name("base", name))
    if kind == "tag":
        return Source("tag", check_name("tag", name))
    volume, at, sequence = name.rpartition("@")
    number = sequence.isascii() and sequence.isdigit() and len(sequence) <= 20
    if kind != "snapshot" or not at or not number:
        raise ConfigError(f"{text[:140]!r} is not volume:NAME, NAME@SEQ, base:NAME or tag:NAME")
    return Source("snapshot", check_name("volume", volume), int(sequence))
