"""The NBD server: it listens, negotiates, and gives sockets to the C core for transmission.

One thread runs every negotiation as a coroutine on a non-blocking socket, so a slow client delays
nobody. A negotiation is bounded in time, bytes and options, and when too many run at once the
oldest gives way, so that idle connections cannot lock others out. Calls that may wait (the export
look-up, attaching to the core) run in a pool of two threads, what is asked of the store in another.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import quote

from msgspec import Struct

from glidefs.config import NbdSettings, parse_listen
from glidefs.transport.nbd import listen as nbd_listen
from glidefs.transport.nbd.connections import ConnectionTable, NbdConnection
from glidefs.transport.nbd.listen import ListenError
from glidefs.transport.nbd.negotiation import Chosen, ExportLookup, Negotiation
from glidefs.transport.nbd.proto import ProtocolViolation

log = logging.getLogger(__name__)

_ACCEPT_RETRY_SECONDS = 0.2
_ACCEPT_WARNING_SECONDS = 30.0
_POOL_THREADS = 2


class HandshakeLimits(Struct, frozen=True):
    """Bounds of negotiations; those in bytes and options are in nbd_proto."""

    seconds: float = 10.0
    at_once: int = 512


class NbdServer:
    """Serves the exports of `exports` on a Unix socket, and on TCP where configured.

    `listeners` are sockets that listen already (socket activation, handoff); when any are given
    they replace the configured addresses, and closing this server leaves their files alone.
    """

    def __init__(
        self,
        settings: NbdSettings,
        exports: ExportLookup,
        listeners: Sequence[socket.socket] = (),
        limits: HandshakeLimits | None = None,
    ) -> None:
        self._settings = settings
        self._exports = exports
        self._limits = limits or HandshakeLimits()
        self._listeners = [nbd_listen.checked_listener(listener) for listener in listeners]
        self._own_files: dict[str, tuple[int, int]] = {}
        self._leftover: list[tuple[str, tuple[int, int]]] = []
        self._kept_files: set[str] = set()
        self._table = ConnectionTable(exports)
        self._pool = ThreadPoolExecutor(_POOL_THREADS, thread_name_prefix="nbd-attach")
        self._slow = ThreadPoolExecutor(_POOL_THREADS, thread_name_prefix="nbd-contexts")
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._accepting: list[asyncio.Task[None]] = []
        self._negotiating: dict[asyncio.Task[Chosen | None], None] = {}  # oldest first
        self._warned = -_ACCEPT_WARNING_SECONDS

    def start(self) -> None:
        """Open the listeners and accept. Raises ListenError."""
        if self._thread is not None:
            raise RuntimeError("the NBD server was started before")
        if not self._listeners:
            self._listen()
        for path, identity in self._leftover:
            nbd_listen.unlink_own(path, identity)
        self._leftover = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._run, args=(self._loop,), name="nbd-handshake", daemon=True
        )
        self._thread.start()

    def _listen(self, inherited: nbd_listen.Inherited = ()) -> None:
        settings = self._settings
        try:
            self._listeners.append(
                nbd_listen.keep_or_listen_unix(inherited, settings.socket, settings.socket_group)
            )
            self._own_files[settings.socket] = nbd_listen.socket_identity(settings.socket)
            if settings.listen is not None:
                host, port = parse_listen(settings.listen)
                self._listeners.append(nbd_listen.keep_or_listen_tcp(inherited, host, port))
                if not host.startswith("127.") and host not in ("localhost", "::1"):
                    log.warning("NBD on %s is neither encrypted nor authenticated", settings.listen)
        except ListenError:
            self.discard(inherited)
            raise

    def close(self, *, handed_over: bool = False) -> None:
        """Stop listening, drop negotiations, end every connection. Safe to call twice.

        With `handed_over` another process has the listeners and the connections: socket files and
        connections are left as they are.
        """
        if self._thread is not None and self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
        if handed_over:
            self.forget()
        else:
            self._table.detach()
        self._pool.shutdown(wait=True)
        self._slow.shutdown(wait=True, cancel_futures=True)
        self._close_listeners()

    def forget(self) -> None:
        """Another process has the listeners and connections: they are left as they are."""
        self._own_files.clear()
        self._table.forget()

    def _close_listeners(self) -> None:
        for path, identity in self._own_files.items():
            nbd_listen.unlink_own(path, identity)
        self._own_files.clear()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def __enter__(self) -> NbdServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def listeners(self) -> tuple[socket.socket, ...]:
        """The sockets that listen, to pass to a successor. They stay this server's."""
        return tuple(self._listeners)

    def uri(self, name: str) -> str:
        """Where clients reach an export: nbd+unix:///NAME?socket=PATH, else nbd://HOST:PORT/NAME."""
        encoded = quote(name, safe="")
        unix = next((at for at in self._listeners if at.family == socket.AF_UNIX), None)
        if unix is None and self._listeners:
            host, port = self._listeners[0].getsockname()[:2]
            return f"nbd://{f'[{host}]' if ':' in host else host}:{port}/{encoded}"
        path = unix.getsockname() if unix is not None else self._settings.socket
        return f"nbd+unix:///{encoded}?socket={quote(os.path.abspath(path))}"

    def connections(self, name: str | None = None) -> list[NbdConnection]:
        """Connections in transmission, of one export or of all."""
        return self._table.listing(name)

    @property
    def table(self) -> ConnectionTable:
        """For the handoff."""
        return self._table

    def inherit(self, inherited: nbd_listen.Inherited) -> None:
        """Before the start: listen on these where the configuration still names them, on new ones else.

        All stay as they are if the service manager had opened them. Raises ListenError.
        """
        if not any(path for path, _ in inherited):
            self._listeners = [nbd_listen.checked_listener(listener) for _, listener in inherited]
            return
        self._listen(inherited)
        self._kept_files = {path for path, _ in inherited if path}
        self._leftover = nbd_listen.close_others(inherited, self._listeners)

    def discard(self, inherited: nbd_listen.Inherited = ()) -> None:
        """Close the listeners, never served on; files of the process before, which may go on, stay."""
        if self._thread is None:
            kept = {path for path, _ in inherited} | self._kept_files
            self._own_files = {path: own for path, own in self._own_files.items() if path not in kept}
            self._close_listeners()

    def named_listeners(self) -> list[tuple[str, socket.socket]]:
        """The sockets that listen, each with the socket file that goes when the server closes, or ""."""
        paths = [*self._own_files, *[""] * len(self._listeners)]
        return list(zip(paths, self._listeners, strict=False))

    @property
    def is_running(self) -> bool:
        """Whether it was started."""
        return self._thread is not None

    def pause(self, seconds: float) -> None:
        """Accept no connections for now; what negotiates gets `seconds` to end, then it is dropped."""
        self._table.pause(True)
        self._from_outside(self._pause(seconds))
        self._table.settled(seconds)

    def resume(self) -> None:
        """Accept again."""
        self._table.pause(False)
        self._from_outside(self._resume())

    def _from_outside(self, work: Coroutine[None, None, None]) -> None:
        if self._thread is None or self._loop is None or not self._thread.is_alive():
            work.close()
            return
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _pause(self, seconds: float) -> None:
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        self._accepting = []
        if self._negotiating:
            await asyncio.wait(list(self._negotiating), timeout=seconds)
        for negotiation in list(self._negotiating):
            negotiation.cancel()

    async def _resume(self) -> None:
        if not self._accepting and not self._stop.is_set():
            self._accepting = [asyncio.create_task(self._accept(at)) for at in self._listeners]

    def connection_closed(self, conn_id: int, err: int) -> str:
        """The core's event CONN_CLOSED; `err` is 0 or the errno that ended the connection.

        Returns the export that it was of, "" if it is not known.
        """
        about = self._table.ended(conn_id, err)
        return about.export if about is not None else ""

    def close_export(self, name: str) -> None:
        """End every connection of an export; returns when they are gone.

        The look-up must not answer the name any more, else clients connect again at once.
        """
        self._table.detach(name)

    # ---- the handshake thread ----

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.run_until_complete(self._serve())
        finally:
            loop.close()

    async def _serve(self) -> None:
        await self._resume()
        await self._stop.wait()
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        negotiating = list(self._negotiating)  # their callbacks close the sockets
        for negotiation in negotiating:
            negotiation.cancel()
        await asyncio.gather(*negotiating, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                await self._accept_failed(error)
                continue
            if len(self._negotiating) >= self._limits.at_once:
                oldest = next((task for task in self._negotiating if not task.cancelling()), None)
                if oldest is not None:
                    oldest.cancel()
            peer = nbd_listen.peer_name(connection)
            newest = asyncio.create_task(self._negotiate(connection, peer))
            self._negotiating[newest] = None
            newest.add_done_callback(partial(self._negotiated, connection, peer))
            await asyncio.sleep(0)  # accept can succeed at once for ever: let the others run

    async def _accept_failed(self, error: OSError) -> None:
        """The client left already, or descriptors or memory have run out: wait for some."""
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            await asyncio.sleep(0)
            return
        if time.monotonic() - self._warned >= _ACCEPT_WARNING_SECONDS:
            self._warned = time.monotonic()
            log.warning("cannot accept NBD connections: %s; raise LimitNOFILE", error.strerror)
        await asyncio.sleep(_ACCEPT_RETRY_SECONDS)

    async def _negotiate(self, connection: socket.socket, peer: str) -> Chosen | None:
        try:
            nbd_listen.tune_connection(connection)
            async with asyncio.timeout(self._limits.seconds):
                return await Negotiation(connection, self._exports, self._pool, self._slow).run()
        except TimeoutError:
            log.debug("NBD client %s did not finish the handshake in %g s", peer, self._limits.seconds)
        except (ProtocolViolation, EOFError, OSError) as error:
            log.debug("NBD client %s left in the handshake: %s", peer, error)
        except Exception:
            log.exception("NBD handshake with %s failed", peer)
        return None

    def _negotiated(self, connection: socket.socket, peer: str, task: asyncio.Task[Chosen | None]) -> None:
        """A callback, because a task cancelled before its first step never runs a `finally`."""
        del self._negotiating[task]
        chosen = None if task.cancelled() else task.result()
        if chosen is None:
            connection.close()
        else:
            self._pool.submit(self._table.attach, connection, chosen, peer)
