"""Where the API listens: a Unix socket of mode 0600, and TCP for clients that present the token.

One thread with one event loop serves all listeners; the router's calls run in its thread pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import uvicorn

from glidefs.api.looking import UI_PATHS
from glidefs.api.peer import PeerProtocol
from glidefs.config import ApiSettings, parse_listen
from glidefs.errors import ConfigError, GlideError
from glidefs.transport.nbd.listen import (
    Inherited,
    activated_listeners,
    close_others,
    keep_or_listen_tcp,
    keep_or_listen_unix,
    socket_identity,
    unlink_own,
)

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

MIN_TOKEN = 16
START_TIMEOUT = 120.0
"""Seconds. Guests are served by then and may leave little CPU time: not a reason to end the daemon soon."""
STOP_TIMEOUT = 10.0


class TokenGuard:
    """Lets a request through only with `Authorization: Bearer TOKEN`.

    The files of the dashboard need none: its page asks for it.
    """

    def __init__(self, app: AsgiApp, token: str) -> None:
        self._app = app
        self._expected = f"bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, rest = given.partition(b" ")
        known = hmac.compare_digest(scheme.lower() + b" " + rest.strip(), self._expected)
        if known or (scope["method"] in ("GET", "HEAD") and scope["path"] in UI_PATHS):
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        answer = b'{"error":"a bearer token is required","hint":"send the content of [api] token_file"}'
        await send({"type": "http.response.body", "body": answer})


def read_token(path: str) -> str:
    """The token in a file that only its owner may read. Raises ConfigError; never shows the token."""
    try:
        status = os.stat(path)
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII text"
        raise ConfigError(f"[api] token_file {path}: {reason}") from None
    if status.st_mode & 0o077:
        raise ConfigError(f"[api] token_file {path}: others can read it; chmod 600 {path}")
    if len(token) < MIN_TOKEN or not token.isprintable() or " " in token:
        raise ConfigError(f"[api] token_file {path}: a token has at least {MIN_TOKEN} characters, no spaces")
    return token


class ApiServer:
    """The listeners and their thread. `start()` returns once requests are answered."""

    def __init__(self, settings: ApiSettings, app: AsgiApp) -> None:
        self._settings = settings
        self._app = app
        self._thread: threading.Thread | None = None
        self._servers: list[tuple[uvicorn.Server, list[socket.socket]]] = []
        self._identity: tuple[int, int] | None = None
        self._made = False
        self._leftover: list[tuple[str, tuple[int, int]]] = []
        self._failure: BaseException | None = None
        self._running = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def prepare(self, inherited: Inherited = ()) -> None:
        """Open what `start()` serves, and read the token: whatever can be wrong with it is found here.

        Listeners of the process before are used where the configuration still names them. Raises
        ListenError, ConfigError.
        """
        settings = self._settings
        guarded = TokenGuard(self._app, read_token(settings.token_file or "")) if settings.listen else None
        unix = [at for path, at in inherited if at.family == socket.AF_UNIX and not path]
        unix = unix or activated_listeners("api", os.environ)
        try:
            if not unix:
                unix = [keep_or_listen_unix(inherited, settings.socket)]
                self._made = all(path != settings.socket for path, _ in inherited)
                self._identity = socket_identity(settings.socket)
            self._servers.append((_server(self._app), unix))
            if settings.listen and guarded:
                tcp = keep_or_listen_tcp(inherited, *parse_listen(settings.listen))
                self._servers.append((_server(guarded), [tcp]))
        except BaseException:
            self.close(handed_over=True)
            raise
        self._leftover = close_others(inherited, [at for _, sockets in self._servers for at in sockets])

    def start(self) -> None:
        """Serve on what `prepare()` has opened, once. Raises as that does, and GlideError."""
        if self._thread is not None:
            return
        if not self._servers:
            self.prepare()
        try:
            self._thread = threading.Thread(target=self._serve, name="api", daemon=True)
            self._thread.start()
            if not self._running.wait(START_TIMEOUT) or self._failure:
                raise GlideError(f"the control API did not start: {self._failure or 'timeout'}")
        except BaseException:
            self.close()
            raise
        for path, identity in self._leftover:
            unlink_own(path, identity)
        self._leftover = []

    def _serve(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._failure = error
            if self._running.is_set():
                log.critical("the control API stopped: %s", error, exc_info=error)
            self._running.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(server.serve(sockets)) for server, sockets in self._servers]
        while not all(server.started for server, _ in self._servers) and not any(
            task.done() for task in tasks
        ):
            await asyncio.sleep(0.005)
        self._running.set()
        await asyncio.gather(*tasks)

    def stop_listening(self) -> None:
        """Take no new connections; those that are there are served. The sockets are another process's."""
        loop = self._loop
        if loop is None or self._thread is None or not self._thread.is_alive():
            return
        done = threading.Event()

        def stop() -> None:
            for server, _ in self._servers:
                for listening in server.servers:
                    listening.close()
            done.set()

        loop.call_soon_threadsafe(stop)
        done.wait(STOP_TIMEOUT)

    def descriptors(self) -> list[tuple[str, int]]:
        """The listeners, each with the socket file that is ours to remove, or ""."""
        return [
            (self._settings.socket if self._identity and at.family == socket.AF_UNIX else "", at.fileno())
            for _, sockets in self._servers
            for at in sockets
        ]

    def close(self, *, handed_over: bool = False) -> None:
        """Stop listening, let running requests finish for a moment, remove the socket file.

        With `handed_over` another process has the listeners, and the file stays; one that was made here and
        never served on is removed all the same.
        """
        if handed_over and not (self._made and self._thread is None):
            self._identity = None
        for server, _ in self._servers:
            server.should_exit = True
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT)
            self._thread = None
        for _, sockets in self._servers:
            for listener in sockets:
                with contextlib.suppress(OSError):
                    listener.close()
        self._servers.clear()
        if self._identity is not None:
            unlink_own(self._settings.socket, self._identity)
            self._identity = None


def _server(app: AsgiApp) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http=PeerProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
        )
    )
