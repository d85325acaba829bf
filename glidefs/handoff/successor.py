"""The new process's side of a handoff: it does all slow work while the old one serves, then takes over.

What it does when something fails is in `predecessor.py`. If the old process dies before the cut-over,
this one starts as after any crash; after it, it simply goes on. If the old process lives and does not go on
with the handoff, or has called it off, this one ends: without the cut-over it touches no log, device or
listener.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Protocol, TypeVar

from glidefs.errors import GlideError
from glidefs.handoff.channel import CalledOff, Channel, PeerGone, PeerSilent, Undelivered
from glidefs.handoff.coordinator import HandoffCoordinator, close_all
from glidefs.handoff.deadlines import Patience, deadlines
from glidefs.handoff.history import History
from glidefs.handoff.launch import FD_VARIABLE, PARENT_VARIABLE
from glidefs.handoff.protocol import (
    CAPABILITIES,
    VERSION,
    Abort,
    Alive,
    CutOver,
    Hello,
    HelloAck,
    ListenerInfo,
    Message,
    ProtocolError,
    Ready,
    Served,
)

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)


class Aborted(GlideError):
    """The predecessor goes on; this process has nothing to do."""


class Starting(Protocol):
    """What is used of the daemon."""

    history: History
    asked_to_stop: threading.Event
    """Set when the process shall end: before the cut-over it then ends at once."""

    def start(
        self, listeners: list[tuple[ListenerInfo, int]] | None = None, locks: list[int] | None = None
    ) -> None:
        """Start as after a crash, with these locks and listeners if there are any."""
        ...

    def stand_by(
        self, locks: list[int], listeners: list[tuple[ListenerInfo, int]], names: tuple[str, ...]
    ) -> HandoffCoordinator:
        """Open these exports while the predecessor serves them, and what this process will listen on."""
        ...

    def be_main_process(self) -> None:
        """Tell the service manager that this process is the one to watch."""
        ...

    def take_over(self, listeners: list[tuple[ListenerInfo, int]]) -> None:
        """The exports are served: listen, and look after everything from now on."""
        ...

    def leave_standby(self) -> None:
        """Forget what was opened in standby."""
        ...


def is_successor() -> bool:
    """Whether this process was started to take over from another one."""
    return FD_VARIABLE in os.environ


class Successor:
    """One handoff. ``run()`` returns with the daemon serving, or raises."""

    def __init__(self, daemon: Starting, cache_dir: str, program: str) -> None:
        self._daemon = daemon
        self._hello = Hello(VERSION, VERSION, tuple(sorted(CAPABILITIES)), os.getpid(), cache_dir, program)
        self._locks: list[int] = []
        self._listeners: list[tuple[ListenerInfo, int]] = []
        fd, parent = int(os.environ.pop(FD_VARIABLE)), int(os.environ.pop(PARENT_VARIABLE))
        os.set_inheritable(fd, False)
        # If that process is dead already its number may be another's: the socket then ends, and
        # `os.getppid` tells.
        peer = os.pidfd_open(parent) if os.getppid() == parent else _dead()
        self._channel = Channel(socket.socket(fileno=fd), peer, "successor", daemon.asked_to_stop)

    def run(self) -> None:
        """Take over. Raises Aborted, or GlideError after which the process must end."""
        try:
            self._run()
        except PeerGone:
            log.error("the predecessor died in the handoff: starting as after a crash")
            self._daemon.leave_standby()
            self._daemon.history.add("predecessor-died")
            self._daemon.start(self._listeners, self._locks)
        except CalledOff as reason:
            raise Aborted(str(reason)) from reason
        except Exception as error:
            self._channel.call_off(str(error) or type(error).__name__)
            raise
        finally:
            self._channel.close()

    def _run(self) -> None:
        channel, daemon = self._channel, self._daemon
        channel.send(self._hello)
        ack, descriptors = _expect(channel, HelloAck, deadlines().ack)
        self._locks = descriptors[: ack.locks]
        self._listeners = list(zip(ack.listeners, descriptors[ack.locks :], strict=True))
        daemon.history = History(ack.totals)
        began = time.monotonic()
        coordinator = daemon.stand_by(self._locks, self._listeners, ack.exports)
        channel.send(Ready(time.monotonic() - began))
        cut, sockets = self._wait_cut_over()
        channel.committed = True
        self._cut_over(coordinator, cut, sockets)
        channel.wait_closed(deadlines().closed)  # then the predecessor takes no connections any more
        daemon.take_over(self._listeners)

    def _wait_cut_over(self) -> tuple[CutOver, list[int]]:
        """Whoever gives up waiting does not get it any more: sending it then fails over there."""
        channel = self._channel
        try:
            return _expect(channel, CutOver, deadlines().cut_over)
        except (PeerSilent, CalledOff) as error:
            channel.fence()
            try:
                return _expect(channel, CutOver, 0)  # it was on its way
            except PeerGone:
                if isinstance(error, PeerSilent):
                    raise
            except GlideError:
                pass
            raise error

    def _cut_over(self, coordinator: HandoffCoordinator, cut: CutOver, sockets: list[int]) -> None:
        """From here on nobody but this process serves.

        Raises CalledOff if the predecessor lives and cannot hear "alive": it is about to kill this process.
        """
        with self._devices_let_go(any(export.transport == "ublk" for export in cut.exports)):
            coordinator.recover_handoff_devices(cut.exports, sockets)
        try:
            self._channel.send(Alive(_since(cut.frozen_at)))
        except PeerGone:
            log.warning("the predecessor died after the cut-over")
        coordinator.go_on()
        stall = _since(cut.frozen_at)
        with contextlib.suppress(Undelivered, GlideError, OSError):  # it did not wait for the figure
            self._channel.post(Served(stall))
        self._daemon.history.add("succeeded", stall)
        log.info("took over %d exports, guests waited %.1f ms", len(cut.exports), stall * 1e3)

    @contextlib.contextmanager
    def _devices_let_go(self, needed: bool) -> Iterator[None]:
        """Before Linux 6.16 devices wait for the old process to end its threads; one that does not is killed.

        The exports are not its any more, and it cannot have missed an "alive": there is none yet.
        """
        recovered = os.eventfd(0, os.EFD_CLOEXEC)

        def watch() -> None:
            poll = select.poll()
            poll.register(recovered, select.POLLIN)
            left = Patience(deadlines().let_go)
            while not left.over:
                if left.wait(poll):
                    return
            log.warning("the predecessor has stopped and keeps its devices: killed")
            self._daemon.be_main_process()
            self._channel.kill_peer()

        watcher = threading.Thread(target=watch, name="handoff-devices", daemon=True)
        try:
            if needed:
                watcher.start()
            yield
        finally:
            os.eventfd_write(recovered, 1)
            if needed:
                watcher.join()
            os.close(recovered)


def _since(frozen_at: int) -> float:
    return (time.monotonic_ns() - frozen_at) / 1e9


def _expect(channel: Channel, kind: type[M], patience: float) -> tuple[M, list[int]]:
    message, descriptors = channel.receive(patience)
    if isinstance(message, kind):
        return message, descriptors
    close_all(descriptors)
    if isinstance(message, Abort):
        raise CalledOff(message.reason)
    raise ProtocolError(f"the predecessor said {type(message).__name__}, not {kind.__name__}")


def _dead() -> int:
    """A descriptor that is ready to be read at once, as the pidfd of a dead process is."""
    read, write = os.pipe()
    os.close(write)
    return read
