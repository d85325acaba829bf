"""The running daemon's side of a handoff: it starts its successor, and either exits or goes on.

Which process serves after a failure, and why there is never a second one at the logs:

- before the cut-over was sent, this one: it has only stood still, and goes on. The successor is told, and
  killed if it does not end; it touches nothing without the cut-over;
- after it, the successor alone, until it is dead (a pidfd tells, and its last message was read): then
  this one opens everything again as after a crash of its own (*revival*), with the connections that it
  still has. One that is late is fenced, so that it cannot come alive any more, and then killed;
- after "alive" was received this one only exits, whatever happens.

docs/handoff.md has a table: each message, and who owns the exports when either side stops there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from msgspec import Struct

from glidefs.errors import GlideError
from glidefs.exports.table import Entry
from glidefs.handoff import launch
from glidefs.handoff.channel import CalledOff, Channel, PeerGone, Undelivered
from glidefs.handoff.coordinator import HandoffCoordinator, close_all
from glidefs.handoff.deadlines import deadlines
from glidefs.handoff.history import History
from glidefs.handoff.protocol import (
    CAPABILITIES,
    Abort,
    Alive,
    CutOver,
    ExportCut,
    Hello,
    HelloAck,
    ListenerInfo,
    Message,
    ProtocolError,
    Ready,
    Served,
    common_version,
)
from glidefs.host.host import Host

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)


class HandoffFailed(GlideError):
    """A handoff did not come about; the exports are served by the process that served them before."""

    temporary = True


class Outcome(Struct, frozen=True):
    """What came of a handoff. ``stall`` in seconds, 0 where guests noticed nothing; ``pid`` serves now."""

    outcome: str
    reason: str
    pid: int
    exports: int = 0
    connections: int = 0
    stall: float = 0.0
    dry_run: bool = False


class Serving(Protocol):
    """What is used of the daemon."""

    history: History
    asked_to_stop: threading.Event
    """Set when the process shall end: a handoff that has not cut over yet is called off."""

    @property
    def config_file(self) -> str:
        """The configuration that a successor reads."""
        ...

    @property
    def cache_dir(self) -> Path:
        """The cache directory, which both must have."""
        ...

    @property
    def host(self) -> Host:
        """Its volumes and their threads."""
        ...

    def shut(self, why: str, patience: float) -> contextlib.AbstractContextManager[list[Entry]]:
        """All exports, with no verb running on any; verbs that come are refused."""
        ...

    def reopen(self) -> None:
        """Verbs run again."""
        ...

    def stop_listening(self) -> None:
        """The API takes no new connections."""
        ...

    def coordinator(self, entries: list[Entry]) -> HandoffCoordinator:
        """For these exports."""
        ...

    def descriptors(self) -> tuple[list[int], list[tuple[ListenerInfo, int]]]:
        """Locks and listeners, as duplicates that are the caller's."""
        ...

    def revive(
        self, cuts: list[ExportCut], sockets: list[int], listeners: list[tuple[ListenerInfo, int]]
    ) -> None:
        """Open everything again, as after a crash, with these connections and listeners."""
        ...


class Predecessor:
    """One handoff. ``run()`` returns what came of it; if it succeeded, the caller must exit."""

    def __init__(self, daemon: Serving) -> None:
        self._daemon = daemon
        self._frozen_at = 0
        self._cuts: list[ExportCut] = []
        self._sockets: list[int] = []
        self._common: frozenset[str] = frozenset()
        self._locks: list[int] = []
        self._listeners: list[tuple[ListenerInfo, int]] = []
        self._torn_down = False

    def run(self, *, dry_run: bool = False) -> Outcome:
        """Hand over. Raises HandoffFailed: this process serves, as before or again."""
        child, channel = self._start()
        outcome = None
        reason = "the predecessor failed"
        try:
            outcome = self._hand_over(channel, child.pid, dry_run)
            reason = outcome.reason
        except (GlideError, PeerGone, OSError) as error:
            reason = "the successor died" if isinstance(error, PeerGone) else str(error)
            self._daemon.history.add("aborted")
            raise HandoffFailed(
                f"the handoff was aborted: {reason}; the exports are served as before"
            ) from error
        finally:
            if outcome is None or outcome.outcome != "succeeded":
                channel.call_off(reason)
            channel.close()
            close_all([*self._locks, *(fd for _, fd in self._listeners)])
            self._see_off(child, succeeded=outcome is not None and outcome.outcome == "succeeded")
        return outcome

    def _start(self) -> tuple[subprocess.Popen[bytes], Channel]:
        """Start the successor, from the program as it is on the disk now."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child = None
        with theirs:
            try:
                child = launch.start(self._daemon.config_file, theirs.fileno())
                peer = os.pidfd_open(child.pid)
            except OSError as error:
                ours.close()
                if child is not None:
                    self._see_off(child, succeeded=False)
                raise HandoffFailed(f"the successor cannot be started: {error}") from error
        log.info("handoff: process %d is to take over", child.pid)
        return child, Channel(ours, peer, "predecessor", self._daemon.asked_to_stop)

    def _see_off(self, child: subprocess.Popen[bytes], *, succeeded: bool) -> None:
        """Wait for the end of the child; one that was told to end and does not is killed.

        A stopped successor holds the locks of the directories: before this process ends, it must have ended.
        """

        def wait() -> None:
            try:
                child.wait(None if succeeded else deadlines().end)
            except subprocess.TimeoutExpired:
                log.warning("process %d did not end after the handoff was called off: killed", child.pid)
                child.kill()
                child.wait()

        if self._daemon.asked_to_stop.is_set() and not succeeded:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(deadlines().end)
            return
        threading.Thread(target=wait, name="handoff-child", daemon=True).start()

    # -- the steps ---------------------------------------------------------------------------------

    def _hand_over(self, channel: Channel, pid: int, dry_run: bool) -> Outcome:
        hello = _expect(channel, Hello, deadlines().hello)
        version = common_version(hello)
        if Path(hello.cache_dir).resolve() != self._daemon.cache_dir.resolve():
            raise HandoffFailed(f"the configuration names another cache directory now: {hello.cache_dir}")
        why = "the exports are being handed to a new process; try again"
        with self._daemon.shut(why, deadlines().verbs) as entries:
            served = [entry for entry in entries if entry.volume is not None and entry.state == "serving"]
            return self._with_verbs_shut(channel, served, hello, version, pid, dry_run)

    def _with_verbs_shut(
        self, channel: Channel, entries: list[Entry], hello: Hello, version: int, pid: int, dry_run: bool
    ) -> Outcome:
        coordinator = self._daemon.coordinator(entries)
        common = self._common = CAPABILITIES & set(hello.capabilities)
        if coordinator.has_devices() and "ublk" not in common:
            raise HandoffFailed(f"{hello.program} cannot take ublk devices over")
        with self._uploads_paused():
            self._locks, self._listeners = self._daemon.descriptors()
            names = tuple(entry.name for entry in coordinator.entries)
            listeners = tuple(info for info, _ in self._listeners)
            ack = HelloAck(
                version,
                tuple(sorted(common)),
                names,
                len(self._locks),
                listeners,
                self._daemon.history.totals,
            )
            channel.send(ack, [*self._locks, *(fd for _, fd in self._listeners)])
            _expect(channel, Ready, deadlines().ready)
            coordinator.sync_all()
            if dry_run:
                self._daemon.reopen()
                return Outcome("aborted", "only a rehearsal", os.getpid(), len(names), dry_run=True)
            self._cut_over(channel, coordinator)
            return self._after_cut_over(channel, coordinator, pid)

    @contextlib.contextmanager
    def _uploads_paused(self) -> Iterator[None]:
        """No commit and no retire inside. Whoever leaves with success exits without going on."""
        self._daemon.host.pause(deadlines().uploads)
        try:
            yield
        finally:
            if not self._torn_down:
                self._daemon.host.resume()

    def _cut_over(self, channel: Channel, coordinator: HandoffCoordinator) -> None:
        """Freeze and say so. What fails here is undone: without the message the successor touches nothing."""
        channel.check()
        try:
            coordinator.pause_listeners()
            self._frozen_at = time.monotonic_ns()
            coordinator.freeze_all()
            self._cuts, self._sockets = coordinator.snapshot(self._common)
            channel.post(CutOver(tuple(self._cuts), self._frozen_at), self._sockets)
        except BaseException as error:
            coordinator.unfreeze_all()  # first of all: guests wait
            close_all(self._sockets)
            if isinstance(error, Undelivered):
                raise channel.last_words() from error
            raise
        channel.committed = True

    def _after_cut_over(self, channel: Channel, coordinator: HandoffCoordinator, pid: int) -> Outcome:
        connections = sum(len(cut.connections) for cut in self._cuts)
        if coordinator.has_devices():
            self._tear_down(coordinator)
        try:
            alive = self._wait_alive(channel)
        except (PeerGone, GlideError) as error:
            self._tear_down(coordinator)
            return self._revive(coordinator, str(error) or "the successor died", connections)
        self._torn_down = True  # nothing of this process goes on
        self._daemon.stop_listening()
        close_all(self._sockets)
        return Outcome("succeeded", "", pid, len(self._cuts), connections, _stall(channel, alive))

    def _wait_alive(self, channel: Channel) -> Alive:
        """Raises PeerGone or GlideError once the successor is certainly dead, and cannot have come alive."""
        try:
            return _expect(channel, Alive, deadlines().alive)
        except GlideError as error:
            channel.fence()
            with contextlib.suppress(PeerGone, GlideError):
                return _expect(channel, Alive, 0)  # it was on its way
            channel.kill_peer()
            raise error

    def _tear_down(self, coordinator: HandoffCoordinator) -> None:
        """The exports are the successor's, or nobody's: nothing that fails here changes that."""
        if not self._torn_down:
            self._torn_down = True
            _quietly(coordinator.take_ublk_server)

    def _revive(self, coordinator: HandoffCoordinator, reason: str, connections: int) -> Outcome:
        """The successor is dead, and the exports are nobody's: this process opens them again."""
        log.error("the handoff failed after the cut-over: %s; this process goes on", reason)
        _quietly(coordinator.forget)
        try:
            self.revive_after_failed_handoff()
        except Exception:
            log.critical(
                "the exports cannot be opened again; this process ends, start the daemon", exc_info=True
            )
            os._exit(1)  # half of what serves is gone: a new process recovers, as after a crash
        stall = (time.monotonic_ns() - self._frozen_at) / 1e9
        self._daemon.history.add("revived", stall)
        return Outcome("revived", reason, os.getpid(), len(self._cuts), connections, stall)

    def revive_after_failed_handoff(self) -> None:
        """Ordinary recovery, in the process that served before, with its connections."""
        listeners, self._listeners = self._listeners, []
        self._daemon.revive(self._cuts, self._sockets, listeners)


def _expect(channel: Channel, kind: type[M], patience: float) -> M:
    message, descriptors = channel.receive(patience)
    if isinstance(message, kind):
        return message
    close_all(descriptors)
    if isinstance(message, Abort):
        raise CalledOff(message.reason)
    raise ProtocolError(f"the successor said {type(message).__name__}, not {kind.__name__}")


def _quietly(step: Callable[[], None]) -> None:
    try:
        step()
    except Exception:
        log.exception("not everything could be let go")


def _stall(channel: Channel, alive: Alive) -> float:
    """How long guests waited, as exactly as the successor says it."""
    try:
        return _expect(channel, Served, deadlines().served).stall
    except (PeerGone, GlideError):
        return alive.stall
