"""The socket of a handoff: every wait ends, and what is believed of the other process has evidence."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from glidefs.handoff import channel as channel_module
from glidefs.handoff.channel import CalledOff, Channel, PeerGone, PeerSilent, Undelivered
from glidefs.handoff.deadlines import SECONDS_VARIABLE, SLICE, Patience
from glidefs.handoff.protocol import Abort, Alive, Ready, Served

SHORT = '{"send": 0.3, "dying": 0.4}'


class Ends:
    """Both ends in this process; the pidfd of either shows a process that only sleeps."""

    def __init__(self) -> None:
        self.cancel = threading.Event()
        self.other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.near = Channel(near, os.pidfd_open(self.other.pid), "predecessor", self.cancel)
        self.far = Channel(far, os.pidfd_open(self.other.pid), "successor")

    def kill(self) -> None:
        self.other.kill()
        self.other.wait()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    monkeypatch.setenv(SECONDS_VARIABLE, SHORT)
    made = Ends()
    yield made
    made.kill()
    made.near.close()
    made.far.close()


def fill(channel: Channel) -> None:
    """Send more than the socket holds."""
    for _ in range(10000):
        channel.send(Abort("x" * 5000))


def test_a_silent_process_is_waited_for_as_long_as_said(ends: Ends) -> None:
    began = time.monotonic()
    with pytest.raises(PeerSilent, match="does not answer"):
        ends.near.receive(0.3)
    assert 0.25 < time.monotonic() - began < 5


def test_a_process_that_does_not_read_is_not_waited_for_for_ever(ends: Ends) -> None:
    with pytest.raises(PeerSilent, match="does not read"):
        fill(ends.near)


def test_descriptors_arrive_and_are_not_inherited(ends: Ends) -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(600)]
    ends.near.send(Ready(1.0), fds)
    message, got = ends.far.receive(5)
    assert message == Ready(1.0)
    assert len(got) == 600
    assert not any(os.get_inheritable(fd) for fd in got)
    for fd in (*fds, *got):
        os.close(fd)


def test_a_broken_pipe_with_last_words_is_no_death(ends: Ends) -> None:
    ends.far.send(Abort("changed my mind"))
    ends.near.send(Served(1.0))  # not read over there: the socket says "reset" first
    ends.far.close()
    with pytest.raises(CalledOff, match="changed my mind"):
        ends.near.send(Ready(1.0))


def test_the_words_of_a_process_that_reset_the_socket_are_read(ends: Ends) -> None:
    ends.far.send(Alive(0.5))
    ends.near.send(Served(1.0))
    ends.far.close()
    assert ends.near.receive(1)[0] == Alive(0.5)


def test_a_living_process_that_hangs_up_has_called_it_off(ends: Ends) -> None:
    ends.far.close()
    with pytest.raises(CalledOff, match="hung up"):
        ends.near.receive(60)
    with pytest.raises(CalledOff, match="hung up"):
        ends.near.send(Ready(1.0))


def test_a_process_is_dead_when_it_is_gone_and_its_words_are_read(ends: Ends) -> None:
    ends.far.send(Alive(0.5))
    ends.kill()
    assert ends.near.receive(60)[0] == Alive(0.5)
    with pytest.raises(PeerGone):
        ends.near.receive(60)


def test_a_death_that_is_seen_late_is_a_death(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sockets of a process end before a pidfd shows that it has."""
    monkeypatch.setenv(SECONDS_VARIABLE, '{"dying": 30}')
    ends.far.close()
    later = threading.Timer(0.5, ends.other.kill)
    later.start()
    with pytest.raises(PeerGone):
        ends.near.receive(60)
    later.join()


def test_after_the_fence_nothing_arrives_and_the_other_side_knows(ends: Ends) -> None:
    ends.far.send(Served(1.0))
    ends.near.fence()
    with pytest.raises(Undelivered):
        ends.far.post(Alive(0.5))
    assert ends.near.receive(0)[0] == Served(1.0)
    with pytest.raises(PeerSilent):
        ends.near.receive(60)


def test_who_calls_it_off_says_why_and_takes_no_more(ends: Ends) -> None:
    ends.near.call_off("not today")
    with pytest.raises(CalledOff, match="not today"):
        ends.far.send(Alive(0.5))


def test_calling_it_off_waits_for_nobody(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeerSilent):
        fill(ends.near)
    monkeypatch.setenv(SECONDS_VARIABLE, '{"send": 60}')
    began = time.monotonic()
    ends.near.call_off("enough")
    assert time.monotonic() - began < 5
    with pytest.raises(Undelivered):
        ends.far.post(Alive(0.5))


def test_a_wait_ends_when_this_process_shall_stop(ends: Ends) -> None:
    threading.Timer(0.3, ends.cancel.set).start()
    with pytest.raises(CalledOff, match="told to stop"):
        ends.near.receive(60)


def test_past_the_cut_over_it_does_not(ends: Ends) -> None:
    ends.cancel.set()
    ends.near.committed = True
    with pytest.raises(PeerSilent):
        ends.near.receive(0.3)


def test_check_notices_a_process_that_gave_up(ends: Ends) -> None:
    ends.near.check()
    ends.far.send(Abort("no patience"))
    with pytest.raises(CalledOff, match="no patience"):
        ends.near.check()


def test_a_stopped_process_can_be_killed(ends: Ends) -> None:
    ends.other.send_signal(signal.SIGSTOP)
    ends.near.kill_peer()
    assert ends.other.wait(5) == -signal.SIGKILL


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Stopped:
        """A poll that returns after half a minute, as it does to a process that is stopped in it."""

        def poll(self, milliseconds: float) -> list[tuple[int, int]]:
            now[0] += 30.0
            return []

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    patience = Patience(SLICE * 2.5)
    waits = 0
    while not patience.over:
        patience.wait(Stopped())  # type: ignore[arg-type]
        waits += 1
    assert waits == 3


def test_the_hooks_of_these_tests_are_off_by_default() -> None:
    assert not {channel_module.DIE_VARIABLE, channel_module.STOP_VARIABLE} & set(os.environ)
    channel_module.at_boundary("successor", "before", "hello")
    assert select.poll().poll(0) == []
