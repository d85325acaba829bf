"""A front-end under load while its daemon is killed, hands over, dies on the way, or stops for a while."""

from __future__ import annotations

import os
import random
import select
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from front_end import FrontEnd
from handoff_rig import Generations
from load import Load, Reads
from waiting import wait_for

from glidefs.api.client import CommandError

SETTINGS = {
    "cache": {"log_size": '"512MiB"', "segment_size": '"1MiB"', "block_cache_size": '"32MiB"'},
    "upload": {"sync_interval": '"2s"'},
    "vhost_user": {"dir": '"vhost"', "mode": '"0600"'},
}
KILLS = int(os.environ.get("GLIDEFS_KILLS", "3"))
HANDOFFS = int(os.environ.get("GLIDEFS_HANDOFFS", "5"))

Make = Callable[..., Generations]


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[Make]:
    made: list[Generations] = []

    def make(die: str = "") -> Generations:
        node = Generations(tmp_path / f"n{len(made)}", settings=SETTINGS)
        node.die = die
        made.append(node)
        node.start()
        node.run("create", "vm", "--size", "64MiB", "--transport", "vhost-user")
        return node

    yield make
    for node in made:
        node.kill_all()


def path_of(node: Generations, name: str = "vm") -> str:
    shown = node.json("show", name)
    assert shown["transport"] == "vhost-user"
    return str(shown["device"])


class Loaded:
    """A front-end with a load, for the length of a `with`."""

    def __init__(self, node: Generations, *, reconnects: bool = False, pause: float = 0.001) -> None:
        self.guest = FrontEnd(path_of(node), queues=2, num=128).up()
        self.load = Load(self.guest, pause=pause)
        self.connections = 1
        if reconnects:
            self.load.lost = self._come_back

    def _come_back(self) -> None:
        poll = select.poll()
        poll.register(self.guest.sock, select.POLLRDHUP)
        if not poll.poll(0):
            return
        self.guest.reconnect()
        self.connections += 1

    def goes_on(self) -> None:
        done = self.load.done
        wait_for(lambda: self.load.error or self.load.done > done + 100, "requests are answered", 60)

    def __enter__(self) -> Loaded:
        self.load.start()
        self.goes_on()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.goes_on()
            self.load.finish()
        finally:
            self.guest.close()


def test_an_export_and_its_socket(make_daemon: Make) -> None:
    node = make_daemon()
    path = path_of(node)
    assert path == str(node.base / "vhost" / "vm.sock")
    mode = os.stat(path).st_mode
    assert (stat.S_ISSOCK(mode), mode & 0o777) == (True, 0o600)
    with Loaded(node):
        assert "a vhost-user front-end is connected" in node.fails("detach", "vm")
        node.run("resize", "vm", "128MiB")
    wait_for(lambda: node.run("transport", "vm", "nbd", check=False).returncode == 0, "nobody uses it")
    assert not os.path.exists(path)
    node.run("transport", "vm", "vhost-user")
    assert path_of(node) == path
    node.run("transport", "vm", "auto")
    assert node.json("show", "vm")["transport"] != "vhost-user"
    node.run("transport", "vm", "vhost-user")
    node.run("detach", "vm")
    assert not os.path.exists(path)


def test_killed_and_started_again(make_daemon: Make) -> None:
    node = make_daemon()
    with Loaded(node, reconnects=True) as loaded:
        for _ in range(KILLS):
            node.kill()
            node.start()
            loaded.goes_on()
        assert loaded.connections == KILLS + 1


def test_stopped_and_started_again(make_daemon: Make) -> None:
    node = make_daemon()
    with Loaded(node, reconnects=True) as loaded:
        path = path_of(node)
        node.stop()
        assert not os.path.exists(path)
        node.start()
        loaded.goes_on()


def test_handoffs_under_load(make_daemon: Make) -> None:
    node = make_daemon()
    with Loaded(node, pause=0) as loaded:
        for _ in range(HANDOFFS):
            answer = node.handoff()
            assert answer["outcome"] == "succeeded"
            loaded.goes_on()
        assert loaded.connections == 1
    assert FrontEnd(path_of(node)).up().read(0, 512) is not None
    print(f"longest wait {loaded.load.longest * 1e3:.1f} ms, {loaded.load.done} requests")


@pytest.mark.parametrize(
    ("die", "outcome"),
    [
        ("successor:after:ready", ""),
        ("successor:got:cut-over", "revived"),
        ("successor:before:alive", "revived"),
    ],
)
def test_a_successor_that_dies(make_daemon: Make, die: str, outcome: str) -> None:
    node = make_daemon(die)
    with Loaded(node) as loaded:
        try:
            answer = node.handoff()["outcome"]
        except CommandError:
            answer = ""
        assert answer == outcome or (answer == "revived" and not outcome)
        loaded.goes_on()
    with Loaded(node):
        pass


@pytest.mark.parametrize("die", ["predecessor:after:cut-over", "predecessor:got:alive"])
def test_a_predecessor_that_dies_after_the_cut_over(make_daemon: Make, die: str) -> None:
    node = make_daemon(die)
    with Loaded(node) as loaded:
        first = node.pid
        with pytest.raises(CommandError):
            node.handoff()
        wait_for(lambda: node.ready() and node.pid != first, f"the successor serves\n{node.log_text}")
        loaded.goes_on()


def test_a_predecessor_that_dies_before_it(make_daemon: Make) -> None:
    node = make_daemon("predecessor:before:cut-over")
    with Loaded(node, reconnects=True) as loaded:
        first = node.pid
        with pytest.raises(CommandError):
            node.handoff()
        wait_for(lambda: node.ready() and node.pid != first, f"the successor serves\n{node.log_text}")
        loaded.goes_on()


def test_a_rehearsal(make_daemon: Make) -> None:
    node = make_daemon()
    with Loaded(node) as loaded:
        assert node.handoff(dry_run=True)["outcome"] == "aborted"
        loaded.goes_on()
        os.kill(node.pid, signal.SIGHUP)
        first = node.pid
        wait_for(lambda: node.ready() and node.pid != first, f"the successor serves\n{node.log_text}")
        loaded.goes_on()


def test_cold_reads_of_a_fork_through_handoffs(make_daemon: Make, tmp_path: Path) -> None:
    """Reads that wait for the store when the daemon changes, of a disk that is larger than the cache."""
    node = make_daemon()
    content = random.Random(1).randbytes(48 << 20)
    (tmp_path / "image").write_bytes(content)
    node.run("bless", str(tmp_path / "image"), "--name", "linux")
    node.run("create", "fork", "--from", "base:linux", "--transport", "vhost-user")
    guest = FrontEnd(path_of(node, "fork"), queues=2, num=128).up()
    load = Reads(guest, content, depth=32)
    load.start()
    try:
        for _ in range(HANDOFFS):
            done = load.done
            assert node.handoff()["outcome"] == "succeeded"
            wait_for(lambda done=done: load.error or load.done > done + 100, "reads are answered", 60)
        load.finish()
    finally:
        guest.close()


def test_another_host_takes_the_transport_over(make_daemon: Make, tmp_path: Path) -> None:
    """What `glidefs transport` chose is in the store; a start before it was there changes nothing."""
    node = make_daemon()
    node.run("create", "moves", "--size", "64MiB", "--transport", "nbd")
    node.run("drain", "moves")
    node.run("transport", "moves", "vhost-user")
    node.kill()
    node.start()
    assert node.json("show", "moves")["transport"] == "vhost-user"
    node.run("detach", "moves")
    other = Generations(tmp_path / "other", settings={**SETTINGS, "store": {"url": f'"file://{node.store}"'}})
    try:
        other.start()
        assert other.json("attach", "moves")["transport"] == "vhost-user"
    finally:
        other.kill_all()
