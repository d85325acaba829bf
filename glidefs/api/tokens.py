"""Tokens of clients over TCP: the files that say which there are, and how a new one is made.

A file of tokens has the hash of each, never the token. It is read again when it has changed, which is looked
at once a second at most. One that cannot be read lets nobody in: a token that was withdrawn must not work on
because of a mistake in the next line.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from glidefs.api.access import WORDS, Scope, highest
from glidefs.errors import ConfigError
from glidefs.formats.atomic import write_file_atomic

log = logging.getLogger(__name__)

MIN_TOKEN = 16
"""Characters of a token that somebody chose."""
LOOK_EVERY = 1.0
"""Seconds between two looks at the file."""
PREFIX = "gfs_"
"""Begins each token that is made here, so that scanners for secrets know one."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Expired(Exception):
    """The token was good until some time ago."""


class Token(Struct, frozen=True):
    """A token by its SHA-256. ``expires``: unix seconds, None for never."""

    name: str
    digest: bytes
    scope: Scope
    expires: float | None = None


class _Entry(Struct, forbid_unknown_fields=True):
    name: str
    sha256: Annotated[str, Meta(pattern="^[0-9a-fA-F]{64}$")]
    scopes: Annotated[list[str], Meta(min_length=1)]
    expires: Any = None


class _File(Struct, forbid_unknown_fields=True):
    token: list[_Entry] = []


class Tokens:
    """All tokens of a daemon. For one thread. Raises ConfigError where a file is not as it should be."""

    def __init__(self, token_file: str | None, tokens_file: str | None) -> None:
        self._one = [] if token_file is None else [Token("", _digest(read_token(token_file)), Scope.ADMIN)]
        self._path = tokens_file
        self._seen: tuple[int, ...] = ()
        self._looked = time.monotonic()
        self._listed: Sequence[Token] = ()
        if tokens_file is not None:
            self._seen = _state(tokens_file)
            self._listed = read_tokens(tokens_file)

    def find(self, given: bytes) -> Token | None:
        """The token that a client sent, if it is one of ours. Takes the same time whichever it is.

        Raises Expired.
        """
        self._look()
        digest, found = hashlib.sha256(given).digest(), None
        for token in (*self._one, *self._listed):
            if hmac.compare_digest(token.digest, digest):
                found = token
        if found is not None and found.expires is not None and found.expires <= time.time():
            raise Expired(f"the token {found.name} has expired; make another one with 'glidefs token'")
        return found

    def _look(self) -> None:
        """Read the file again if it has changed."""
        now = time.monotonic()
        if self._path is None or now - self._looked < LOOK_EVERY:
            return
        self._looked = now
        state = _state(self._path)
        if state == self._seen:
            return
        self._seen = state
        try:
            self._listed = read_tokens(self._path)
            log.info("[api] tokens_file %s: read again, %d tokens", self._path, len(self._listed))
        except ConfigError as error:
            self._listed = ()
            log.error("%s; until then no token of it is accepted", error)


def _state(path: str) -> tuple[int, ...]:
    """What changes whenever the file does; empty if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _read(key: str, path: str) -> str:
    """A file that only its owner may read. Raises ConfigError; never shows what is in it."""
    try:
        mode = os.stat(path).st_mode
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"[api] {key} {path}: {reason}") from None
    if mode & 0o077:
        raise ConfigError(f"[api] {key} {path}: others can read it; chmod 600 {path}")
    return text


def read_token(path: str) -> str:
    """The token in a file of [api] token_file. Raises ConfigError; never shows the token."""
    token = _read("token_file", path).strip()
    if len(token) < MIN_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(f"[api] token_file {path}: a token has at least {MIN_TOKEN} characters, no spaces")
    return token


def read_tokens(path: str) -> list[Token]:
    """The tokens in a file of [api] tokens_file. Raises ConfigError that names the file and the entry."""
    text = _read("tokens_file", path)
    try:
        entries = msgspec.convert(tomllib.loads(text), _File).token
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"[api] tokens_file {path}: {error}") from None
    found: list[Token] = []
    for entry in entries:
        try:
            found.append(_checked(entry, found))
        except ValueError as error:
            raise ConfigError(f"[api] tokens_file {path}: token {entry.name[:64]!r}: {error}") from None
    return found


def _checked(entry: _Entry, before: Sequence[Token]) -> Token:
    """Raises ValueError."""
    check_token_name(entry.name)
    digest = bytes.fromhex(entry.sha256)
    if any(entry.name == token.name or digest == token.digest for token in before):
        raise ValueError("another entry has the same name or the same sha256")
    if unknown := [word for word in entry.scopes if word not in WORDS]:
        raise ValueError(f"there is no scope {unknown[0][:40]!r}; there is {', '.join(WORDS)}")
    expires = None if entry.expires is None else unix_time(entry.expires)
    return Token(entry.name, digest, highest(entry.scopes), expires)


def unix_time(value: object) -> float:
    """Unix seconds of a time of TOML, or of RFC 3339 as text. Raises ValueError."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            value = None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError("expires is a time with its zone, such as 2027-01-31T00:00:00Z")
    return value.timestamp()


def check_token_name(name: str) -> str:
    """``name``, if it is one that a log line can have. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError("a name has 1-64 of letters, digits, '.', '_', '-', the first a letter or digit")
    return name


def new_token() -> str:
    """A token that nobody can guess: 256 bits."""
    return PREFIX + secrets.token_urlsafe(32)


def entry_text(name: str, token: str, scopes: Sequence[str], expires: float | None = None) -> str:
    """The entry of a token in a file."""
    lines = [
        "[[token]]",
        f"name = {json.dumps(name)}",
        f'sha256 = "{_digest(token).hex()}"',
        f"scopes = {json.dumps(list(scopes))}",
    ]
    if expires is not None:
        lines.append(f"expires = {datetime.fromtimestamp(expires, UTC).strftime('%Y-%m-%dT%H:%M:%SZ')}")
    return "\n".join(lines) + "\n"


def append_entry(path: str, name: str, entry: str) -> None:
    """Add an entry to a file, which is made if it is not there; a reader sees the old or the new file.

    Raises ConfigError if the file is not one of tokens, or has that name already.
    """
    before = ""
    if os.path.exists(path):
        if any(token.name == name for token in read_tokens(path)):
            raise ConfigError(f"{path} has a token {name} already; delete its entry, or take another name")
        before = Path(path).read_text(encoding="utf-8")
        before += "" if before.endswith("\n") or not before else "\n"
    write_file_atomic(path, (before + ("\n" if before else "") + entry).encode())
