"""The tutorial of PostgreSQL on a device, as written, and what it says of a host that died.

The two hosts are two daemons with one store; whichever kind of device this kernel serves well is taken.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("glidefs.core._core")
import device_rig as rig
from device_kinds import REASONS, SETTINGS, no_nbd_leftovers
from doc_blocks import ROOT, Block, blocks_of, environment_of_this_tree
from handoff_rig import Generations
from udev_rig import led_to, settle, udev_missing, udevd
from waiting import wait_for

PROGRAMS = Path("/usr/lib/postgresql/15/bin")
PAGE = ROOT / "docs" / "tutorials" / "postgresql.md"
TRANSACTIONS = 600

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(3600 if rig.EMULATED else 900),
    pytest.mark.skipif(all(REASONS.values()), reason=f"no kind of device: {REASONS}"),
    pytest.mark.skipif(udev_missing() is not None, reason=f"no udev: {udev_missing()}"),
    pytest.mark.skipif(not PROGRAMS.is_dir(), reason="no PostgreSQL 15: apt install postgresql-15"),
]


class Hosts(NamedTuple):
    """Two daemons, and shells on their hosts."""

    first: Generations
    second: Generations
    environment: dict[str, str]

    def run(self, host: Generations, code: str) -> str:
        """What ``code`` prints, a script that must succeed."""
        done = subprocess.run(
            ["bash", "-euc", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=rig.STEP,
            env=self.environment | {"GLIDEFS_CONFIG": str(host.config)},
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}\n{host.log_text[-3000:]}"
        return done.stdout

    def ask(self, port: int, statement: str) -> str:
        """The answer of a server, whoever's host it is."""
        question = ["psql", "-h", "/tmp", "-p", str(port), "-v", "ON_ERROR_STOP=1", "-At", "-c", statement]
        return rig.run("runuser", "-u", "postgres", "--", *question)


@pytest.fixture
def hosts(place: Path) -> Iterator[Hosts]:
    """Nothing of PostgreSQL, no mount, daemon or device outlives it."""
    first = Generations(place / "a", settings=SETTINGS)
    daemon = SETTINGS["daemon"] | {"node": '"second"'}
    second = Generations(
        place / "b", settings=SETTINGS | {"daemon": daemon, "store": {"url": f'"file://{first.store}"'}}
    )
    leftovers = contextlib.nullcontext() if REASONS["ublk"] else rig.no_leftovers()
    with udevd(), leftovers, no_nbd_leftovers():
        try:
            yield Hosts(first.start(), second.start(), environment_of_this_tree(place / "bin"))
        finally:
            subprocess.run(["pkill", "-9", "-u", "postgres"], check=False)
            for at in ("pg", "pg-restored", "pg-latest"):  # while the daemons still serve
                rig.unmount(f"/srv/{at}")
            first.kill_all()
            second.kill_all()


def blocks() -> list[Block]:
    """Those of the page that are for a host with devices."""
    return [block for block in blocks_of(PAGE.read_text(encoding="utf-8")) if block.place]


def crowd(hosts: Hosts, device: str) -> None:
    """Transactions of four clients, through a kill and a handoff of the daemon below them."""
    bench = ["runuser", "-u", "postgres", "--", str(PROGRAMS / "pgbench"), "-h", "/tmp", "-p", "5499"]
    rig.run(*bench, "-i", "-q", "-s", "1", "postgres")
    load = subprocess.Popen(
        [*bench, "-n", "-c", "4", "-t", str(TRANSACTIONS // 4), "postgres"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    hosts.first.kill()
    hosts.first.start()
    assert hosts.first.handoff()["outcome"] == "succeeded"
    said = load.communicate(timeout=rig.STEP)[0]
    assert load.returncode == 0, said
    assert f"{TRANSACTIONS}/{TRANSACTIONS}" in said, said
    settle()
    assert led_to("pg") == device


def end_servers() -> None:
    """As a host that dies ends them."""
    rig.run("pkill", "-9", "-u", "postgres")
    asked = ["pgrep", "-c", "-u", "postgres"]
    wait_for(lambda: subprocess.run(asked, capture_output=True, check=False).returncode, "they are gone")


def latest(hosts: Hosts) -> None:
    """The first host dies; the second takes its volume over and starts a server. The first comes back."""
    end_servers()
    hosts.first.kill_all()
    taken = hosts.second.json("attach", "pg", "--take-over")
    at = Path("/srv/pg-latest")
    at.mkdir()
    rig.run("mount", taken["device"], at)
    (at / "data/postmaster.pid").unlink()
    start = ["-D", at / "data", "-l", at / "data/log", "-o", "-k /tmp -p 5497", "-w", "start"]
    rig.run("runuser", "-u", "postgres", "--", PROGRAMS / "pg_ctl", *start)
    hosts.first.start()
    wait_for(lambda: hosts.first.json("show", "pg")["state"] == "fenced", "the first host knows")
    rig.run("umount", "/srv/pg")
    hosts.first.json("detach", "pg")


def test_the_page_runs_as_written_and_a_host_dies(hosts: Hosts) -> None:
    before = len(rig.kernel_log())
    make, backup, restore = blocks()
    assert [b.place for b in (make, backup, restore)] == ["first host", "first host", "second host"]
    hosts.run(hosts.first, make.code)
    device = led_to("pg")
    assert hosts.first.json("show", "pg")["device"] == device
    crowd(hosts, device)
    hosts.run(hosts.first, backup.code)
    hosts.ask(5499, "insert into orders values (3, 'after the backup')")
    hosts.ask(5499, "checkpoint")
    hosts.first.json("drain", "pg")
    printed = hosts.run(hosts.second, restore.code)
    assert restore.prints is not None
    assert printed.endswith(restore.prints), printed
    accounts = "(select sum(abalance) from pgbench_accounts)"
    assert hosts.ask(5498, f"select sum(delta) = {accounts} from pgbench_history") == "t\n"
    assert hosts.ask(5498, "select count(*) from pgbench_history") == f"{TRANSACTIONS}\n"
    assert rig.io_errors(before) == []
    latest(hosts)
    assert hosts.ask(5497, "select what from orders order by id").splitlines()[-1] == "after the backup"
    check = [PROGRAMS / "pg_amcheck", "-h", "/tmp", "-p", "5497", "--all", "--install-missing"]
    rig.run("runuser", "-u", "postgres", "--", *check)
    end_servers()
