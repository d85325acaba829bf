"""SIGSTOP of either side at each message, for longer than the other one waits, then SIGCONT.

A guest writes and verifies all the while. Afterwards one process has the export, the other one is gone, no
request failed, and no guest waited longer than the process that had its export was stopped, or a deadline.
The table of docs/handoff.md is this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from comparing_guest import Guest
from handoff_rig import Generations, is_running, state_of
from waiting import DEADLINE, wait_for

from glidefs.api.client import CommandError

Make = Callable[..., Generations]

LONG = os.environ.get("GLIDEFS_TEST_LENGTH") == "long"
AT_ONCE = 4
SHORT = {"hello": 25.0, "ready": 25.0, "cut_over": 10.0, "alive": 10.0}
"""Seconds of deadlines within which the other side does some work, on a busy machine; others are SHORTER."""
SHORTER = 1.5
STOP = 30.0
"""Seconds of a stop with the product's own deadlines (in the long run)."""
SLACK = 10.0
"""Seconds that a busy machine may add to a stall, and a successor's start to that of a revival."""


class Cell(NamedTuple):
    """Who stops where; the deadline of the other side that passes; the outcome; what guests wait for.

    ``waits``: "no", or for the end of the "stop", or of the "deadline".
    """

    at: str
    deadline: str
    outcome: str
    waits: str

    @property
    def side(self) -> str:
        return self.at.split(":")[0]


GRID = [
    Cell("successor:before:hello", "hello", "aborted", "no"),
    Cell("successor:after:hello", "ready", "aborted", "no"),
    Cell("successor:got:hello-ack", "ready", "aborted", "no"),
    Cell("successor:before:ready", "ready", "aborted", "no"),
    Cell("successor:after:ready", "alive", "revived", "deadline"),
    Cell("successor:got:cut-over", "alive", "revived", "deadline"),
    Cell("successor:before:alive", "alive", "revived", "deadline"),
    Cell("successor:after:alive", "served", "succeeded", "stop"),
    Cell("successor:before:served", "served", "succeeded", "stop"),
    Cell("successor:after:served", "served", "succeeded", "stop"),
    Cell("predecessor:got:hello", "ack", "aborted", "stop"),
    Cell("predecessor:before:hello-ack", "ack", "aborted", "stop"),
    Cell("predecessor:after:hello-ack", "cut_over", "aborted", "stop"),
    Cell("predecessor:got:ready", "cut_over", "aborted", "stop"),
    Cell("predecessor:before:cut-over", "cut_over", "aborted", "stop"),
    Cell("predecessor:after:cut-over", "closed", "succeeded", "no"),
    Cell("predecessor:got:alive", "closed", "succeeded", "no"),
    Cell("predecessor:got:served", "closed", "succeeded", "no"),
]


class Row(NamedTuple):
    """What was seen in a cell; times in seconds."""

    cell: Cell
    outcome: str
    stopped: float
    stall: float


class Trial:
    """One handoff with one stop."""

    def __init__(self, node: Generations, cell: Cell, number: int) -> None:
        self.node, self.cell = node.start(), cell
        node.run("create", "vm", "--size", "64MiB", "--transport", "nbd")
        self.guest = Guest(node, "vm", number, DEADLINE * 3)
        self.first = node.pid

    def run(self, hold: Callable[[Trial, int, Future[str]], None]) -> Row:
        """``hold`` returns when the process that stopped shall go on."""
        self.guest.start()
        wait_for(self.guest.went_on, "the guest is served")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self.ask)
            pid = wait_for(self.stopped, f"a process stops at {self.cell.at}")
            began = time.monotonic()
            try:
                assert (pid == self.first) == (self.cell.side == "predecessor")
                hold(self, pid, answer)
            finally:
                length = time.monotonic() - began
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            outcome = answer.result(DEADLINE)
        self.look_at_end(outcome)
        return Row(self.cell, outcome, length, self.guest.longest)

    def ask(self) -> str:
        try:
            answer: dict[str, Any] = self.node.client.call("POST", "/admin/handoff", {}, timeout=DEADLINE * 3)
            return str(answer["outcome"])
        except CommandError as error:
            return "aborted" if "the handoff was aborted" in str(error) else str(error)

    def stopped(self) -> int | None:
        return next((pid for pid in self.node.processes() if state_of(pid) == "T"), None)

    def look_at_end(self, outcome: str) -> None:
        node = self.node
        wait_for(lambda: len(node.processes()) == 1, f"one process is left\n{node.log_text}")
        [owner] = node.processes()
        assert (owner != self.first) == (outcome == "succeeded"), node.log_text
        wait_for(lambda: node.ready() and node.pid == owner, f"process {owner} serves\n{node.log_text}")
        wait_for(self.guest.went_on, f"the guest goes on\n{node.log_text}")
        self.guest.finish()
        node.run("drain", "vm")
        if LONG:
            os.kill(owner, signal.SIGKILL)
            wait_for(lambda: not is_running(owner), "the owner is dead")
            node.process = None
            node.stop_at = ""
            node.start()
            self.guest.verify()


def until_given_up(trial: Trial, pid: int, answer: Future[str]) -> None:
    """Longer than the other side's deadline: until it has acted on that."""
    if trial.cell.side == "successor":
        if trial.cell.outcome == "succeeded":
            wait_for(lambda: not is_running(trial.first), "the predecessor ends")
        else:
            answer.result(DEADLINE)
    elif trial.cell.outcome == "succeeded":
        wait_for(lambda: "took over 1 exports" in trial.node.log_text, "the successor takes over")
        wait_for(trial.guest.went_on, "the guest is served while the predecessor is stopped")
    else:
        wait_for(lambda: trial.node.processes() == [pid], f"the successor ends\n{trial.node.log_text}")


def for_a_while(trial: Trial, pid: int, answer: Future[str]) -> None:
    """As long as an operator's mistake, with the product's own deadlines."""
    until = time.monotonic() + STOP
    wait_for(lambda: time.monotonic() >= until, "the time is up", STOP * 2)


def seconds_of(cell: Cell) -> float:
    """The deadline that passes in a cell."""
    return SHORT.get(cell.deadline, SHORTER)


def deadlines_of(cell: Cell) -> str:
    """For a node. The second that it waits for "served" is too short for a side that is to stop at it."""
    return json.dumps({"served": 25.0, cell.deadline: seconds_of(cell), "end": SHORTER})


def run_grid(make: Make, hold: Callable[[Trial, int, Future[str]], None], *, own: bool) -> list[Row]:
    """All cells, a few side by side; prints the table."""
    nodes = [make(stop_at=cell.at, seconds="" if own else deadlines_of(cell)) for cell in GRID]

    def run(number: int) -> Row | BaseException:
        try:
            return Trial(nodes[number], GRID[number], number).run(hold)
        except BaseException as error:
            error.add_note(f"stopped at {GRID[number].at}")
            return error
        finally:
            nodes[number].kill_all()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(run, range(len(GRID))))
    print(f"\n{'stopped at':32} {'outcome':10} {'stopped':>8} {'guests waited':>14}")
    for row in results:
        if isinstance(row, Row):
            print(f"{row.cell.at:32} {row.outcome:10} {row.stopped:7.1f}s {row.stall:13.2f}s")
    failures = [error for error in results if isinstance(error, BaseException)]
    if failures:
        raise BaseExceptionGroup("cells that failed", failures)
    return [row for row in results if isinstance(row, Row)]


@pytest.mark.timeout(600)
def test_either_side_stops_longer_than_the_other_waits(make_daemon: Make) -> None:
    for row in run_grid(make_daemon, until_given_up, own=False):
        assert row.outcome == row.cell.outcome, row
        waits = {"no": 0.0, "stop": row.stopped, "deadline": seconds_of(row.cell)}[row.cell.waits]
        assert row.stall < waits + SLACK, row


@pytest.mark.skipif(not LONG, reason="18 stops of 30 seconds are for the long run")
@pytest.mark.timeout(3600)
def test_either_side_stops_for_half_a_minute(make_daemon: Make) -> None:
    """Most of these stops are shorter than what the other side has patience for: then it goes on."""
    for row in run_grid(make_daemon, for_a_while, own=True):
        late = row.cell.deadline == "alive"  # which is as long as the stop
        assert row.outcome == "succeeded" or (late and row.outcome == "revived"), row
        assert row.stall < row.stopped + SLACK, row
