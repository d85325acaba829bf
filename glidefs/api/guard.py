"""Doors: what stands between a listener and the application, and says who a request comes from."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

import msgspec

from glidefs.api.access import NEEDS_TOKEN, Caller, Scope, Unauthorized, address_of, note_caller
from glidefs.api.errors import MEDIA_TYPE, headers_of, problem_of
from glidefs.api.tokens import Expired, Tokens

ScopeOf = MutableMapping[str, Any]
"""What ASGI knows of a connection; not a scope of ours."""
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[ScopeOf, Receive, Send], Awaitable[None]]

log = logging.getLogger("glidefs.audit")
SAY_EVERY = 1.0
"""Seconds between two lines about requests without a token that is known."""


class LocalDoor:
    """The Unix socket: whoever may open it may do everything."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: ScopeOf, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http":
            note_caller(scope, Caller(Scope.ADMIN, address_of(scope)))
            await self._app(scope, receive, send)


class TokenDoor:
    """TCP: lets a request through only with `Authorization: Bearer TOKEN`, but for the paths in ``open``."""

    def __init__(self, app: AsgiApp, tokens: Tokens, open_paths: Collection[str]) -> None:
        self._app = app
        self._tokens = tokens
        self._open = open_paths
        self._said = 0.0
        self._unsaid = 0

    async def __call__(self, scope: ScopeOf, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        try:
            note_caller(scope, self._caller(scope))
        except Unauthorized as error:
            self._say(scope, error)
            await _refuse(scope, send, error)
            return
        await self._app(scope, receive, send)

    def _caller(self, scope: ScopeOf) -> Caller:
        """Who has the token of a request. Raises Unauthorized."""
        address = address_of(scope)
        given = next((value for name, value in scope["headers"] if name == b"authorization"), None)
        if given is None:
            if scope["path"] in self._open:
                return Caller(Scope.NONE, address)
            raise Unauthorized(NEEDS_TOKEN)
        scheme, _, rest = given.partition(b" ")
        if scheme.lower() != b"bearer":
            raise Unauthorized(NEEDS_TOKEN)
        try:
            token = self._tokens.find(rest.strip())
        except Expired as error:
            raise Unauthorized(str(error)) from None
        if token is None:
            raise Unauthorized("the token is not known here; see 'glidefs token' and [api] tokens_file")
        return Caller(token.scope, address, token.name)

    def _say(self, scope: ScopeOf, error: Exception) -> None:
        """A line for the audit; one in a while, as anybody can cause it."""
        now = time.monotonic()
        if now - self._said < SAY_EVERY:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} before it)" if self._unsaid else ""
        self._said, self._unsaid = now, 0
        where = f"{scope['method']} {scope['path'][:200]}"
        log.info("%s: 401, %s; by %s%s", where, str(error).split(";")[0], address_of(scope), more)


async def _refuse(scope: ScopeOf, send: Send, error: Exception) -> None:
    problem = problem_of(error, scope["path"][:200])
    body = msgspec.json.encode(problem)
    headers = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), **headers_of(error)}
    fields = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": fields})
    await send({"type": "http.response.body", "body": body if scope["method"] != "HEAD" else b""})
