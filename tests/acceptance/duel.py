"""Two daemons that take one volume from each other, and the moments at which they do."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from node import MIB, Node
from store_front import Front, Hold, Journal, Request
from waiting import DEADLINE, wait_for

VOLUME = "disk"
GRACE = 0.25
"""Seconds that a put which another thread had begun may take to be seen."""


class Side:
    """A daemon and its way to the store."""

    def __init__(self, node: Node, front: Front) -> None:
        self.node = node
        self.front = front
        self.mortal = False
        """Whether it may be killed; the other one shows what 200 rounds leave behind."""

    def attach(self, *, by_command: bool = False) -> dict[str, Any]:
        """Take the volume over. What ``show`` would say of it."""
        shown: dict[str, Any] = (
            self.node.json("attach", VOLUME, "--take-over")
            if by_command
            else self.node.client.call("POST", f"/api/exports/{VOLUME}/attach", {"take_over": True})
        )
        return shown

    def show(self) -> dict[str, Any]:
        """The export as it is."""
        shown: dict[str, Any] = self.node.client.call("GET", f"/api/exports/{VOLUME}")
        return shown

    def is_fenced(self) -> bool:
        """Whether it says that another host has the volume."""
        shown = self.show()
        return shown["state"] == "fenced" and "has it now" in shown["reason"]

    def signal(self, number: int) -> None:
        """To the daemon."""
        os.kill(self.node.pid, number)

    def descriptors(self) -> int:
        """Open files of the daemon."""
        return len(os.listdir(f"/proc/{self.node.pid}/fd"))

    def threads(self) -> int:
        """Threads of the daemon."""
        return len(os.listdir(f"/proc/{self.node.pid}/task"))


def caught(hold: Hold, what: str) -> None:
    """Wait until the request that is to be held is there."""
    assert hold.caught.wait(DEADLINE), f"no {what} came to be held"


@contextmanager
def paused(side: Side) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end."""
    side.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        side.signal(signal.SIGCONT)


def puts_root(request: Request) -> bool:
    return request.puts_root


def puts_pack(request: Request) -> bool:
    return request.puts_pack


# Each moment is a context: it has brought about what it says when the take-over begins, and goes on when the
# new owner has read what it has. Where it gives a function, that is called once the winner has attached.

Moment = Callable[[Side, Side, random.Random], AbstractContextManager[Callable[[], object] | None]]


@contextmanager
def at_random(loser: Side, winner: Side, rng: random.Random) -> Iterator[None]:
    yield


@contextmanager
def commit_is_late(loser: Side, winner: Side, rng: random.Random) -> Iterator[None]:
    """The loser's root is on its way."""
    hold = loser.front.hold(puts_root)
    caught(hold, "commit")
    yield
    hold.release()


@contextmanager
def stopped_in_a_commit(loser: Side, winner: Side, rng: random.Random) -> Iterator[None]:
    """The same, and the loser is stopped."""
    hold = loser.front.hold(puts_root)
    caught(hold, "commit")
    with paused(loser):
        yield
        hold.release()
        time.sleep(rng.uniform(0, 0.3))


@contextmanager
def answer_is_lost(loser: Side, winner: Side, rng: random.Random) -> Iterator[None]:
    """The loser's root is in the store, and it never hears so."""
    hold = loser.front.hold(puts_root, "after")
    caught(hold, "commit")
    yield
    hold.release(lose=True)


@contextmanager
def stopped_before_the_answer(loser: Side, winner: Side, rng: random.Random) -> Iterator[None]:
    """The loser's root is in the store, and it hears so when it is not the last any more."""
    hold = loser.front.hold(puts_root, "after")
    caught(hold, "commit")
    with paused(loser):
        yield
        hold.release()


@contextmanager
def pack_is_late(loser: Side, winner: Side, rng: random.Random) -> Iterator[None]:
    """In the middle of an upload."""
    hold = loser.front.hold(puts_pack)
    caught(hold, "pack")
    yield
    hold.release()


@contextmanager
def stopped(loser: Side, winner: Side, rng: random.Random) -> Iterator[None]:
    """The loser stands still, wherever it is."""
    with paused(loser):
        time.sleep(rng.uniform(0, 0.2))
        yield


@contextmanager
def taken_back_in_an_upload(loser: Side, winner: Side, rng: random.Random) -> Iterator[Callable[[], object]]:
    """The loser uploads much, hears in the middle of it that it lost the volume, and takes it back."""
    commit = loser.front.hold(puts_root)
    caught(commit, "commit")
    wait_for(lambda: loser.node.total("glidefs_dirty_bytes") > 8 * MIB, "much to upload")
    packs = loser.front.hold(puts_pack, every=True)
    commit.release()
    caught(packs, "pack")
    with ThreadPoolExecutor(1) as pool:

        def take_back() -> None:
            asked = pool.submit(loser.attach)
            wait_for(lambda: loser.is_fenced() or asked.done(), "the loser knows of its fence")
            time.sleep(2 * GRACE)
            loser.front.drop_hold()
            asked.result()

        yield take_back


@contextmanager
def killed(loser: Side, winner: Side, rng: random.Random) -> Iterator[None]:
    """The loser dies, and comes back when the volume is not its own any more."""
    with contextlib.ExitStack() as stack:
        if rng.random() < 0.5:
            hold = loser.front.hold(rng.choice([puts_root, puts_pack]), rng.choice(["before", "after"]))
            caught(hold, "request")
            stack.callback(hold.release)
        loser.node.kill()
        yield
    loser.node.start()


@contextmanager
def own_answer_is_lost(loser: Side, winner: Side, rng: random.Random) -> Iterator[None]:
    """The winner does not hear that the volume is its own."""
    hold = winner.front.hold(puts_root, "after")
    hold.release(lose=True)
    yield


@contextmanager
def loser_commits_first(loser: Side, winner: Side, rng: random.Random) -> Iterator[None]:
    """While the winner's root is on its way the loser commits once more."""
    hold = winner.front.hold(puts_root)
    journal = loser.front.journal
    assert journal is not None

    def let_go() -> None:
        if hold.caught.wait(DEADLINE):
            before = roots_of(journal, loser)
            with contextlib.suppress(AssertionError):
                wait_for(lambda: roots_of(journal, loser) > before, "a commit of the loser", 10)
        hold.release()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(let_go)
        yield


@contextmanager
def neck_and_neck(loser: Side, winner: Side, rng: random.Random) -> Iterator[None]:
    """The roots of both come to the store at the same time."""
    theirs = loser.front.hold(puts_root)
    caught(theirs, "commit")
    ours = winner.front.hold(puts_root)

    def let_go() -> None:
        ours.caught.wait(DEADLINE)
        for hold in rng.sample([theirs, ours], 2):
            hold.release()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(let_go)
        yield


@contextmanager
def both_at_once(loser: Side, winner: Side, rng: random.Random) -> Iterator[Callable[[], object]]:
    """The loser asks for it, too, at the same time. Who has it then is open."""

    def ask() -> None:
        time.sleep(rng.uniform(0, 0.02))
        loser.attach()

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(ask).result


def roots_of(journal: Journal, side: Side) -> int:
    """Roots that a side has put."""
    return sum(
        e.request.puts_root and e.done and e.request.front == side.front.name for e in journal.exchanges()
    )


MOMENTS: tuple[Moment, ...] = (
    at_random,
    commit_is_late,
    stopped_in_a_commit,
    answer_is_lost,
    stopped_before_the_answer,
    pack_is_late,
    stopped,
    taken_back_in_an_upload,
    killed,
    own_answer_is_lost,
    loser_commits_first,
    neck_and_neck,
    both_at_once,
)
