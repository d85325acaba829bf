"""glidefs cost: the arithmetic against the design's rules, and figures that were counted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glidefs.cli import cost
from glidefs.cli.cost import DAY, GIB, Load, Prices, Tuning, estimate, uploads
from glidefs.compaction import merge, plan
from glidefs.config import CacheSettings, UploadSettings
from glidefs.formats import manifest, pack
from glidefs.host import watch
from glidefs.manifest import lease
from glidefs.volume.settings import HostSettings

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
BYTES = st.integers(0, 1 << 44)
LOADS = st.builds(
    Load,
    volumes=st.integers(1, 5000),
    hosts=st.integers(1, 50),
    size=st.integers(1, 1 << 46),
    data=BYTES,
    written=BYTES,
    active=st.floats(0, DAY),
    compress=st.floats(0.01, 1),
    read=BYTES,
    read_size=st.integers(4096, 2 * MIB),
    snapshots=st.integers(0, 100),
    snapshot_every=st.floats(0, 30 * DAY),
    compacted=st.floats(0, 10),
)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "glidefs", "cost", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def test_constants_are_those_of_the_code() -> None:
    """The command imports none of it, so that it stays cheap to have."""
    tuning, host, upload = Tuning(), HostSettings(log_dir=Path()), UploadSettings()
    assert tuning.sync_interval == host.sync_interval == upload.sync_interval
    assert tuning.poll_interval == host.poll_interval
    assert tuning.pack_size == host.pack_bytes == upload.pack_size
    assert tuning.batch == min(host.batch_bytes, CacheSettings().log_size // 8)
    assert (tuning.width, tuning.kept) == (host.compact_width, plan.KEEP_UPPER + 1)
    assert tuning.read_limit == merge.READ_LIMIT
    assert tuning.heads_per_second == watch.HEADS_PER_SECOND
    assert tuning.worth_a_page == lease.WORTH_A_PAGE
    assert cost.SUPERSEDED == plan.BOTTOM_SHARE
    assert cost.SECTOR == pack.SECTOR
    assert cost.PAGE_SPAN == manifest.PAGE_CHUNKS * pack.CHUNK


def test_what_scripts_bench_counted() -> None:
    """256 MiB of random writes over an empty volume, in one round: as many packs as ARCHITECTURE.md has."""
    counted = re.search(r"256 MiB of random 4 KiB writes .*? are (\d+) PUTs of packs", _architecture())
    assert counted is not None
    done = uploads(Load(size=64 * GIB, written=256 * MIB, active=30.0), Tuning())
    assert (done.commits, done.packs, done.pages) == (1, int(counted[1]), 0)
    settled = re.search(
        r"are ([\d.]+) times when drained and ([\d.]+) times once compaction", _architecture()
    )
    assert settled is not None
    assert pytest.approx(float(settled[2]) - float(settled[1]), abs=0.02) == cost.COMPACTED


def _architecture() -> str:
    return " ".join((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split())


def test_a_round_each_interval_while_written_to() -> None:
    done = uploads(Load(written=GIB, active=3600.0, size=100 * GIB), Tuning())
    assert (done.commits, done.packs, done.pages) == (120, 120, 0)
    slower = uploads(Load(written=GIB, active=3600.0, size=100 * GIB), Tuning(sync_interval=300.0))
    assert (slower.commits, slower.packs) == (12, 12 * 3)  # 85 MiB each
    fast = uploads(Load(written=100 * GIB, active=600.0), Tuning())
    assert (fast.commits, fast.packs) == (400, 400 * 8)
    assert uploads(Load(written=0), Tuning()) == (0, 0, 0)
    assert uploads(Load(written=4096, active=DAY), Tuning()).commits == 1
    large = uploads(Load(size=1024 * GIB, written=GIB, active=30.0), Tuning())
    assert large.pages == 4 * 8  # a page for each 128 GiB, in each of four rounds


def test_idle_volumes_are_listed_where_that_is_worth_it() -> None:
    idle = Load(written=0, read=0, volumes=7)
    assert estimate(idle)["requests_per_day"]["idle_volumes"]["head"] == 7 * 2 * 2880
    many = estimate(idle._replace(volumes=900))["requests_per_day"]["idle_volumes"]
    assert (many["list"], many["head"]) == (2 * 2880, 0)
    elsewhere = estimate(idle._replace(volumes=9000, hosts=3000))["requests_per_day"]["idle_volumes"]
    assert (elsewhere["list"], elsewhere["head"]) == (0, 9000 * 2 * 2880)


@given(LOADS)
def test_parts_add_up_and_nothing_is_negative(load: Load) -> None:
    result = estimate(load)
    days = dict(result["requests_per_day"])
    total = days.pop("total")
    for kind, count in total.items():
        assert count >= 0
        assert abs(count - sum(part[kind] for part in days.values())) <= len(days)
    stored = dict(result["stored_bytes"])
    assert stored.pop("total") == sum(stored.values())
    assert min(stored.values()) >= 0
    assert result["money_per_month"]["total"] >= 0


@given(LOADS, st.sampled_from(["volumes", "written", "read", "data", "snapshots"]))
def test_more_of_anything_never_costs_less(load: Load, what: str) -> None:
    """But for the way in which roots are compared, which changes where a listing pays."""
    more = estimate(load._replace(**{what: getattr(load, what) * 2 + 1}))
    less = estimate(load)
    assert more["stored_bytes"]["total"] >= less["stored_bytes"]["total"]
    for part in ("uploads", "cold_reads", "gc"):
        for kind in ("put", "get", "delete"):
            assert more["requests_per_day"][part][kind] >= less["requests_per_day"][part][kind] * 0.999 - 1


def test_prices_are_what_is_multiplied() -> None:
    load = Load(written=0, read=0, data=1000 * GIB, compress=1.0)
    money = estimate(load, prices=Prices(stored=1.0, put=0.0, get=0.0))["money_per_month"]
    assert money["stored"] == 1000
    assert money["total"] == 1000
    read = Load(written=0, read=GIB, read_size=MIB, data=0)
    result = estimate(read, prices=Prices(0.0, 0.0, 1.0, 0.0, 2.0))
    assert result["money_per_month"]["out"] == 60
    assert result["requests_per_day"]["cold_reads"]["get"] == 1024


def test_the_command() -> None:
    done = run("--volumes", "10", "--written-per-day", "1GiB", "--price-stored", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["prices"]["stored"] == 0.1
    assert result["requests_per_day"]["uploads"]["put"] == 10 * 2 * 2880
    people = run("--volumes", "10")
    assert people.returncode == 0, people.stderr
    assert "compaction" in people.stdout
    for options, reason in (
        (("--size", "x"), "--size: x is not a size"),
        (("--data", "-1"), "--data -1 is out of range"),
        (("--active", "soon"), "soon is not a duration"),
    ):
        wrong = run(*options)
        assert wrong.returncode == 1
        assert wrong.stderr.startswith("glidefs: ")
        assert reason in wrong.stderr
        assert wrong.stderr.count("\n") == 1
