"""Who asks, and what that client may do: scopes, from the least to the most."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from enum import IntEnum
from typing import Any

from msgspec import Struct

from glidefs.errors import GlideError


class Scope(IntEnum):
    """What a client may do. Each one includes those before it.

    ``NONE`` is a client without a token, for what has nothing of this host in it. ``METRICS`` watches the
    process, ``READ`` looks at everything, ``OPERATE`` makes, changes and removes what can be undone,
    ``ADMIN`` does the rest: what deletes for good, takes from another host, or names files of the daemon's.
    """

    NONE = 0
    METRICS = 1
    READ = 2
    OPERATE = 3
    ADMIN = 4

    @property
    def word(self) -> str:
        """As people write it."""
        return self.name.lower()


WORDS = {scope.word: scope for scope in Scope if scope is not Scope.NONE}
"""The scopes that a token may have, by name."""


class Unauthorized(GlideError):
    """The request has no token that is known here."""


class Forbidden(GlideError):
    """The client's token does not allow this. ``scope`` is the one that it takes."""

    def __init__(self, who: str, has: Scope, takes: Scope, what: str) -> None:
        self.scope = takes
        super().__init__(
            f"{what} takes the scope {takes.word}, and {who} has {has.word}; use a token with {takes.word}"
        )


class Caller(Struct, frozen=True):
    """A client. ``address``: its IP address and port, or its user and process.

    ``token``: the name of its token; empty on the Unix socket, whose mode says who may use it, and with the
    token of `[api] token_file`.
    """

    scope: Scope
    address: str
    token: str = ""

    @property
    def who(self) -> str:
        """For the log."""
        return f"token {self.token} at {self.address}" if self.token else self.address

    def check(self, takes: Scope, what: str) -> None:
        """Raises Forbidden unless this client may do ``what``, Unauthorized if it has not said who it is."""
        if self.scope >= takes:
            return
        if self.scope is Scope.NONE:
            raise Unauthorized(NEEDS_TOKEN)
        raise Forbidden(f"the token {self.token}", self.scope, takes, what)


NEEDS_TOKEN = "a bearer token is required; send 'Authorization: Bearer TOKEN', see docs/api.md"
_KEY = "glidefs.caller"
NOBODY = Caller(Scope.NONE, "unknown")


def note_caller(scope: MutableMapping[str, Any], caller: Caller) -> None:
    """Keep who asks with a request; ``scope`` is that of ASGI."""
    scope[_KEY] = caller


def caller_of(scope: MutableMapping[str, Any]) -> Caller:
    """Who asks; nobody, unless a door let the request in."""
    caller: Caller = scope.get(_KEY, NOBODY)
    return caller


def address_of(scope: MutableMapping[str, Any]) -> str:
    """Where a request comes from: "uid 0 pid 812" on the Unix socket, "10.0.0.7:40312" over TCP."""
    host, port = scope.get("client") or ("unknown", 0)
    return f"{host}:{port}" if port else str(host)


def highest(words: Iterable[str]) -> Scope:
    """What a token with these scopes may do."""
    return max((WORDS[word] for word in words), default=Scope.NONE)
