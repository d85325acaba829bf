"""The new process's side of a handoff: it does all slow work while the old one serves, then takes over.

What it does when something fails is in `predecessor.py`. If the old process dies before the cut-over,
this one starts as after any crash; after it, it simply goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from typing import Protocol, TypeVar

from glidefs.errors import GlideError
from glidefs.handoff.coordinator import HandoffCoordinator, close_all
from glidefs.handoff.history import History
from glidefs.handoff.predecessor import FD_VARIABLE, PARENT_VARIABLE
from glidefs.handoff.protocol import (
    CAPABILITIES,
    VERSION,
    Abort,
    Alive,
    Channel,
    CutOver,
    Hello,
    HelloAck,
    ListenerInfo,
    Message,
    PeerGone,
    ProtocolError,
    Ready,
    Served,
)

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

ACK = 120.0
CUT_OVER = 600.0
"""Seconds that the predecessor has for each step."""
CLOSED = 2.0


class Aborted(GlideError):
    """The predecessor goes on; this process has nothing to do."""


class Starting(Protocol):
    """What is used of the daemon."""

    history: History

    def start(
        self, listeners: list[tuple[ListenerInfo, int]] | None = None, locks: list[int] | None = None
    ) -> None:
        """Start as after a crash, with these locks and listeners if there are any."""
        ...

    def stand_by(
        self, locks: list[int], listeners: list[tuple[ListenerInfo, int]], names: tuple[str, ...]
    ) -> HandoffCoordinator:
        """Open these exports while the predecessor serves them."""
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
        self._channel = Channel(socket.socket(fileno=fd), peer, "successor")

    def run(self) -> None:
        """Take over. Raises Aborted, or GlideError after which the process must end."""
        try:
            self._run()
        except PeerGone:
            log.error("the predecessor died in the handoff: starting as after a crash")
            self._daemon.leave_standby()
            self._daemon.history.add("predecessor-died")
            self._daemon.start(self._listeners, self._locks)
        except Aborted:
            raise
        except Exception as error:
            with contextlib.suppress(PeerGone, OSError):
                self._channel.send(Abort(str(error) or type(error).__name__))
            raise
        finally:
            self._channel.close()

    def _run(self) -> None:
        channel, daemon = self._channel, self._daemon
        channel.send(self._hello)
        ack, descriptors = _expect(channel, HelloAck, ACK)
        self._locks = descriptors[: ack.locks]
        self._listeners = list(zip(ack.listeners, descriptors[ack.locks :], strict=True))
        daemon.history = History(ack.totals)
        began = time.monotonic()
        coordinator = daemon.stand_by(self._locks, self._listeners, ack.exports)
        channel.send(Ready(time.monotonic() - began))
        cut, sockets = _expect(channel, CutOver, CUT_OVER)
        self._cut_over(coordinator, cut, sockets)
        channel.wait_closed(CLOSED)  # then the predecessor takes no connections any more
        daemon.take_over(self._listeners)

    def _cut_over(self, coordinator: HandoffCoordinator, cut: CutOver, sockets: list[int]) -> None:
        """From here on nobody but this process serves."""
        coordinator.recover_handoff_devices(cut.exports, sockets)
        self._tell(Alive(_since(cut.frozen_at)))
        coordinator.go_on()
        stall = _since(cut.frozen_at)
        self._tell(Served(stall))
        self._daemon.history.add("succeeded", stall)
        log.info("took over %d exports, guests waited %.1f ms", len(cut.exports), stall * 1e3)

    def _tell(self, message: Message) -> None:
        try:
            self._channel.send(message)
        except PeerGone:
            log.warning("the predecessor died after the cut-over")


def _since(frozen_at: int) -> float:
    return (time.monotonic_ns() - frozen_at) / 1e9


def _expect(channel: Channel, kind: type[M], patience: float) -> tuple[M, list[int]]:
    message, descriptors = channel.receive(patience)
    if isinstance(message, kind):
        return message, descriptors
    close_all(descriptors)
    if isinstance(message, Abort):
        raise Aborted(message.reason)
    raise ProtocolError(f"the predecessor said {type(message).__name__}, not {kind.__name__}")


def _dead() -> int:
    """A descriptor that is ready to be read at once, as the pidfd of a dead process is."""
    read, write = os.pipe()
    os.close(write)
    return read


__all__ = ["Aborted", "Successor", "is_successor"]
