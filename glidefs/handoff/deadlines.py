"""How long each side of a handoff waits for each step, and how that time is counted.

Which side owns the exports when a wait ends is in docs/handoff.md.
"""

from __future__ import annotations

import os
import select
import time

import msgspec
from msgspec import Struct

SECONDS_VARIABLE = "GLIDEFS_TEST_HANDOFF_SECONDS"
"""For tests: shorter deadlines, as JSON: {"hello": 3, "alive": 1.5}."""
SLICE = 0.2
"""Seconds of one poll, within which a wait notices a call-off, or that this process was stopped."""


class Deadlines(Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds for each step."""

    verbs: float = 10.0
    """The predecessor: for running verbs to end."""
    uploads: float = 60.0
    """The predecessor: for uploads under way to end."""
    hello: float = 60.0
    """The predecessor: for the program to start."""
    ready: float = 300.0
    """The predecessor: for the exports to be open in standby."""
    alive: float = 30.0
    """The predecessor: guests wait; then the successor is killed, and the exports are opened here again."""
    served: float = 1.0
    """The predecessor: for the exact length of the stall."""
    ack: float = 120.0
    """The successor: for hello-ack, before which verbs and uploads of the predecessor end."""
    cut_over: float = 120.0
    """The successor: for the predecessor to sync its logs and to freeze."""
    let_go: float = 10.0
    """The successor: for the kernel to see the predecessor's devices without a server; then it is killed."""
    closed: float = 2.0
    """The successor: for the predecessor to end, before this one listens."""
    send: float = 5.0
    """Either: for a packet to find room in the socket."""
    dying: float = 10.0
    """Either: from the end of the other's socket until a pidfd must show it gone; else it has hung up."""
    end: float = 5.0
    """The predecessor: for a successor that was told to end; then it is killed."""


def deadlines() -> Deadlines:
    """Those in force."""
    text = os.environ.get(SECONDS_VARIABLE, "")
    return msgspec.json.decode(text, type=Deadlines) if text else Deadlines()


class Patience:
    """Seconds that a wait may take, counted in time that this process was there to wait.

    A process that was stopped (SIGSTOP, a frozen cgroup, a paused VM) finds the clock far ahead when it goes
    on; the other one, stopped with it perhaps, still gets what was left.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    @property
    def over(self) -> bool:
        """Whether there is no time left."""
        return self._left <= 0

    def at_most(self, seconds: float) -> None:
        """Shorten it."""
        self._left = min(self._left, seconds)

    def wait(self, poll: select.poll) -> bool:
        """Poll for a slice of it; whether something is ready."""
        length = max(0.0, min(self._left, SLICE))
        began = time.monotonic()
        ready = bool(poll.poll(length * 1000))
        self._left -= min(time.monotonic() - began, length) if ready else length
        return ready
