"""vhost-user as the router knows it: a socket for each export, and the one thread that listens to all.

The thread never waits for a guest's requests. What has to, the end of a session and the answer to
GET_VRING_BASE while requests run, gets a thread of its own for that long, and the export's sockets are not
looked at meanwhile, but for their end.

``_turn`` is held while the thread handles what came, and by whoever changes the table; ``Served.lock`` while
a session is used. Their order is this. Neither is held while something waits for requests of guests.
"""

from __future__ import annotations

import contextlib
import grp
import itertools
import logging
import os
import secrets
import select
import socket
import threading
from collections.abc import Callable, Sequence

import msgspec

from glidefs.config import VhostUserSettings
from glidefs.core.check import Closed
from glidefs.errors import GlideError, NotSupported
from glidefs.transport.base import Attachment, Endpoint
from glidefs.transport.nbd.listen import (
    Inherited,
    ListenError,
    checked_listener,
    listen_unix,
    peer_name,
    socket_identity,
    unlink_own,
)
from glidefs.transport.vhost_user.messages import BadMessage, close_all
from glidefs.transport.vhost_user.moving import SessionCut, adopt, cut_session
from glidefs.transport.vhost_user.session import Refused, Session

log = logging.getLogger(__name__)

_ENDS = select.EPOLLRDHUP | select.EPOLLHUP
_ANY = select.EPOLLIN | _ENDS
_AT_ONCE = 64
"""Messages of one front-end before others get their turn."""


class Served:
    """An export that is served. ``lock`` guards what is below it."""

    def __init__(self, export: Attachment, path: str, listener: socket.socket) -> None:
        self.path = path
        self.listener = listener
        self.identity = socket_identity(path)
        self.lock = threading.Lock()
        self.export = export
        self.session: Session | None = None
        self.ending: threading.Thread | None = None
        self.waiting: threading.Thread | None = None
        self.stopped = False
        self.refused = ""
        """The last front-end that was told no: a line for each of its tries would be too many."""


class VhostUserTransport:
    """The vhost-user sockets of this daemon."""

    kind = "vhost-user"

    def __init__(self, settings: VhostUserSettings) -> None:
        self._settings = settings
        self._turn = threading.Lock()
        self._served: dict[str, Served] = {}
        self._watched: dict[int, tuple[Served, Callable[[Served, int], None]]] = {}
        self._inherited: list[tuple[str, socket.socket]] = []
        self._handed_over = False
        self._paused = False
        self._closing = False
        self._go = threading.Event()
        self._go.set()
        self._troubled: list[int] = []
        self._ids = itertools.count((secrets.randbits(30) << 32) + 1)
        self._poll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wake, select.EPOLLIN)
        self._waking = threading.Lock()  # guards the end of _wake
        self._thread: threading.Thread | None = None

    # -- what the router asks ------------------------------------------------------------------------

    def missing(self) -> str | None:
        """Sockets and shared memory are everywhere."""
        return None

    def prepare(self, device_id: int | None) -> None:
        """Nothing is slow."""

    def path_of(self, name: str) -> str:
        """Where front-ends of an export connect."""
        return os.path.join(os.path.abspath(self._settings.dir), f"{name}.sock")

    def start(self, export: Attachment) -> Endpoint:
        """Listen for the export's front-end. Raises NotSupported where it cannot."""
        path = self.path_of(export.name)
        try:
            listener = self._listener(path)
        except ListenError as error:
            raise NotSupported(f"vhost-user cannot be used: {error}") from error
        served = Served(export, path, listener)
        with self._turn:
            self._served[export.name] = served
            self._watch(listener.fileno(), served, self._accept)
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="vhost-user", daemon=True)
                self._thread.start()
        return Endpoint(device=path)

    def _listener(self, path: str) -> socket.socket:
        for index, (own, listener) in enumerate(self._inherited):
            if own == path:
                del self._inherited[index]
                if os.path.exists(path):
                    return checked_listener(listener)
                listener.close()  # nobody can connect to it any more
                break
        listener = listen_unix(path)
        try:
            if self._settings.group is not None:
                os.chown(path, -1, grp.getgrnam(self._settings.group).gr_gid)
            os.chmod(path, int(self._settings.mode, 8))
        except (KeyError, OSError) as error:
            identity = socket_identity(path)
            listener.close()
            unlink_own(path, identity)
            why = f"there is no group {self._settings.group!r}" if isinstance(error, KeyError) else str(error)
            raise ListenError(f"{path}: {why}; change [vhost_user]") from error
        return listener

    def stop(self, name: str) -> None:
        """End the front-end's session, and its socket. Returns when nothing of it is under way."""
        with self._turn:
            served = self._served.pop(name, None)
            if served is None:
                return
            served.stopped = True
            self._unwatch(served.listener.fileno())
        served.listener.close()
        if not self._handed_over:
            unlink_own(served.path, served.identity)
        with served.lock:
            self._end(served)
            ending = served.ending
        if ending is not None:
            ending.join()

    def release(self, name: str) -> None:
        """The same: front-ends connect again by themselves, and bring what had no answer."""
        self.stop(name)

    def discard(self, name: str, volume_id: bytes, device_id: int) -> None:
        """Nothing is left of front-ends."""

    def in_use(self, name: str) -> str:
        """Whether a front-end is connected, whatever it does."""
        served = self._find(name)
        if served is None:
            return ""
        with served.lock:
            session = served.session
        return f"a vhost-user front-end is connected ({session.peer})" if session is not None else ""

    def check_resize(self, export: Attachment, size: int) -> None:
        """Any size will do: what front-ends see beyond the end fails."""

    def resize(self, export: Attachment) -> str:
        """Tell the front-end, which tells its guest."""
        served = self._find(export.name)
        if served is None:
            return ""
        with served.lock:
            served.export = export
            if served.session is None or served.session.resized(export):
                return ""
        return "the vhost-user front-end cannot be told: its guest sees the new size when it connects again"

    def _find(self, name: str) -> Served | None:
        with self._turn:
            return self._served.get(name)

    def trouble(self, device_id: int) -> None:
        """The core stopped serving a device. Does not block."""
        self._troubled.append(device_id)
        self._nudge()

    def close(self) -> None:
        """End everything, the thread too. Safe to call twice."""
        with self._turn:
            self._closing = True
            names = list(self._served)
        for name in names:
            self.stop(name)
        self._go.set()
        self._nudge()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._waking:
            if self._wake >= 0:
                self._poll.close()
                os.close(self._wake)
                self._wake = -1
        for _, listener in self._inherited:
            listener.close()
        self._inherited = []

    # -- the thread --------------------------------------------------------------------------------------

    def _nudge(self) -> None:
        with self._waking:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _watch(self, fd: int, served: Served, then: Callable[[Served, int], None]) -> None:
        self._watched[fd] = (served, then)
        self._poll.register(fd, _ANY)

    def _unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _run(self) -> None:
        while not self._closing:
            events = self._poll.poll()
            with self._turn:
                if not self._paused:
                    self._handle(events)
            self._go.wait()

    def _handle(self, events: Sequence[tuple[int, int]]) -> None:
        for fd, mask in events:
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                continue
            watched = self._watched.get(fd)
            if watched is not None:
                served, then = watched
                with served.lock:
                    then(served, mask)
        while self._troubled:
            self._end_troubled(self._troubled.pop())

    def _end_troubled(self, device_id: int) -> None:
        for name, served in self._served.items():
            with served.lock:
                session = served.session
                if session is None or session.device.device_id != device_id or served.ending is not None:
                    continue
                with contextlib.suppress(Closed):
                    log.error(
                        "%s: the vhost-user front-end (%s) is not served any more: %s",
                        name,
                        session.peer,
                        session.device.trouble(),
                    )
                session.signal_errors()
                self._end(served)

    def _accept(self, served: Served, _mask: int) -> None:
        try:
            sock, _ = served.listener.accept()
        except OSError:
            return  # it has left already
        peer = peer_name(sock)
        if served.session is not None:
            if served.refused != peer:
                log.warning(
                    "%s: refused the vhost-user front-end %s: %s is connected",
                    served.export.name,
                    peer,
                    served.session.peer,
                )
            served.refused = peer
            sock.close()
            return
        try:
            sock.setblocking(False)
            session = Session(sock, served.export, next(self._ids), self._settings.queues, peer)
        except GlideError as error:
            log.warning("%s: no vhost-user front-end is taken: %s", served.export.name, error)
            sock.close()
            return
        log.info("%s: a vhost-user front-end has connected (%s)", served.export.name, peer)
        self._use(served, session)

    def _use(self, served: Served, session: Session) -> None:
        served.session = session
        served.refused = ""
        self._watch(session.sock.fileno(), served, self._receive)

    def _receive(self, served: Served, mask: int) -> None:
        session = served.session
        if session is None or served.ending is not None:
            return
        name, peer = served.export.name, session.peer
        try:
            if session.unanswered is not None:  # only its end is looked for
                if mask & _ENDS:
                    raise EOFError
                return
            for _ in range(_AT_ONCE):
                message = session.receiver.next(session.sock)
                if message is None:
                    return
                try:
                    if not session.handle(message):
                        self._wait(served, session)
                        return
                except Refused as error:
                    log.warning("%s: the vhost-user front-end (%s): %s", name, peer, error)
        except (EOFError, ConnectionError):
            log.info("%s: the vhost-user front-end has left (%s)", name, peer)
            self._end(served)
        except Closed:
            self._end_stopped(served, session)
        except (BadMessage, GlideError, OSError) as error:
            log.warning("%s: the vhost-user front-end (%s) is cut off: %s", name, peer, error)
            self._end(served)

    def _end_stopped(self, served: Served, session: Session) -> None:
        """The device has stopped: an event says why and ends the session, but if the volume closes."""
        if session.device.closed or not session.device.trouble():
            self._end(served)

    def _wait(self, served: Served, session: Session) -> None:
        """Answer once the requests of the queue have ended."""

        def wait() -> None:
            index = session.awaited_queue()
            with contextlib.suppress(GlideError):
                base = session.device.stop_ring(index, wait=True)
                assert base is not None
                with served.lock:
                    session.stopped(index, base)
                    served.waiting = None
                    if not self._paused:  # else whoever goes on with the session answers
                        self._answer(served, session)

        self._poll.modify(session.sock.fileno(), _ENDS)
        served.waiting = threading.Thread(target=wait, name="vhost-user-wait", daemon=True)
        served.waiting.start()

    def _answer(self, served: Served, session: Session) -> None:
        message, session.unanswered = session.unanswered, None
        if message is None or served.session is not session or served.ending is not None:
            return
        try:
            self._poll.modify(session.sock.fileno(), _ANY)
            if not session.handle(message):
                self._wait(served, session)
        except (GlideError, OSError) as error:
            log.warning("%s: the vhost-user front-end is cut off: %s", served.export.name, error)
            self._troubled.append(session.device.device_id)
            self._nudge()

    def _end(self, served: Served) -> None:
        """Close the session on a thread of its own. With ``served.lock``."""
        session = served.session
        if session is None or served.ending is not None:
            return
        fd = session.sock.fileno()

        def end() -> None:
            try:
                session.close()
            except Exception:
                log.exception("%s: the end of a vhost-user session failed", served.export.name)
            with served.lock:
                served.session = served.ending = None
            self._look_again(served)

        self._unwatch(fd)
        self._unwatch(served.listener.fileno())
        served.ending = threading.Thread(target=end, name="vhost-user-end", daemon=True)
        served.ending.start()

    def _look_again(self, served: Served) -> None:
        """The next front-end may come."""
        with self._turn:
            if not served.stopped:
                self._watch(served.listener.fileno(), served, self._accept)

    # -- handoff ---------------------------------------------------------------------------------------

    def listeners(self) -> list[tuple[str, socket.socket]]:
        """Paths and listening sockets, to pass on. They stay this transport's."""
        with self._turn:
            return [(served.path, served.listener) for served in self._served.values()]

    def inherit(self, inherited: Inherited) -> None:
        """Before the first start: use these listeners, which are this transport's from now on."""
        self._inherited += inherited

    def close_inherited(self) -> None:
        """All exports are started: what nobody wants is closed, and its file removed."""
        inherited, self._inherited = self._inherited, []
        for path, listener in inherited:
            listener.close()
            with contextlib.suppress(OSError):
                unlink_own(path, socket_identity(path))

    def pause(self) -> None:
        """Handle nothing that front-ends say, until :meth:`resume`: exports are about to move, or to come."""
        self._go.clear()
        self._nudge()
        with self._turn:
            self._paused = True

    def resume(self) -> None:
        """Go on, with what was said meanwhile."""
        with self._turn:
            self._paused = False
            served = list(self._served.values())
            for one in served:
                with one.lock:
                    session = one.session
                    if session is None or one.ending is not None:
                        continue
                    if session.unanswered is not None and one.waiting is None:
                        self._answer(one, session)
                    if session.unanswered is None:
                        self._receive(one, 0)  # what a process before had received
        self._go.set()

    def hand_over(self, name: str) -> tuple[bytes, list[int]]:
        """What another process needs to go on with the front-end of an export, whose volume is frozen.

        The descriptors are duplicates, the caller's. Nothing at all if there is no front-end.
        """
        served = self._find(name)
        if served is None:
            return b"", []
        with served.lock:
            if served.session is None or served.ending is not None:
                return b"", []
            cut, fds = cut_session(served.session)
            return msgspec.msgpack.encode(cut), [os.dup(fd) for fd in fds]

    def take_over(self, name: str, data: bytes, descriptors: list[int]) -> None:
        """Go on with such a front-end once the volume, which is frozen, goes on. Owns the descriptors.

        The export was started. Raises GlideError, OSError.
        """
        served = self._find(name)
        try:
            cut = msgspec.msgpack.decode(data, type=SessionCut)
            if served is None:
                raise GlideError(f"{name} is not served by vhost-user here")
        except (GlideError, msgspec.MsgspecError) as error:
            close_all(descriptors)
            raise GlideError(f"it cannot be taken over: {error}") from error
        with self._turn, served.lock:
            session = adopt(cut, descriptors, served.export, next(self._ids))
            self._use(served, session)

    def forget(self) -> None:
        """Another process has the listeners and front-ends: their files are left as they are."""
        self._handed_over = True
