"""Where the API listens: a Unix socket of mode 0600, and TCP for clients that present a token.

One thread with one event loop serves all listeners; the router's calls run in its thread pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import threading

import uvicorn

from glidefs.api.guard import AsgiApp, LocalDoor, TokenDoor
from glidefs.api.pages import UI_PATHS
from glidefs.api.peer import PeerProtocol
from glidefs.api.routes import OPEN
from glidefs.api.tls import server_context
from glidefs.api.tokens import Tokens
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

START_TIMEOUT = 120.0
"""Seconds. Guests are served by then and may leave little CPU time: not a reason to end the daemon soon."""
STOP_TIMEOUT = 10.0


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
        """Open what `start()` serves, read tokens and certificates: what is wrong with them is found here.

        Listeners of the process before are used where the configuration still names them. Raises
        ListenError, ConfigError.
        """
        settings = self._settings
        door = tls = None
        if settings.listen:
            door = TokenDoor(self._app, Tokens(settings.token_file, settings.tokens_file), OPEN | UI_PATHS)
            tls = server_context(settings)
        unix = [at for path, at in inherited if at.family == socket.AF_UNIX and not path]
        unix = unix or _activated()
        try:
            if not unix:
                unix = [keep_or_listen_unix(inherited, settings.socket)]
                self._made = all(path != settings.socket for path, _ in inherited)
                self._identity = socket_identity(settings.socket)
            self._servers.append((_server(LocalDoor(self._app)), unix))
            if settings.listen and door:
                tcp = keep_or_listen_tcp(inherited, *parse_listen(settings.listen))
                self._servers.append((_server(door, tls), [tcp]))
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


def _activated() -> list[socket.socket]:
    """Unix sockets of the service manager. Raises ConfigError for one that is not: it would ask nobody."""
    found = activated_listeners("api", os.environ)
    if any(at.family != socket.AF_UNIX for at in found):
        for at in found:
            at.close()
        raise ConfigError(
            "the socket unit for the API has a port; give it a path, and use [api] listen for TCP"
        )
    return found


def _server(app: AsgiApp, tls: ssl.SSLContext | None = None) -> uvicorn.Server:
    config = uvicorn.Config(
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
    config.load()
    config.ssl = tls  # uvicorn would make one of its own, with files that may be wrong by then
    return uvicorn.Server(config)
