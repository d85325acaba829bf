"""The simulation over many seeds: see README.md for what one is, and how many there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from core_rig import CREATE, SECTOR, WRITE, trace
from faulty_store import KINDS
from handoff_step import VARIANTS
from power_cut import HEAD
from sim_disk import Platter
from sim_identity import CLONED, IDENTITY_WEIGHTS, STORES
from sim_seeds import IDENTITY_REGRESSIONS, REGRESSIONS
from simulation import WEIGHTS, simulate

LENGTH = os.environ.get("GLIDEFS_TEST_LENGTH", "normal")
FIRST = int(os.environ.get("GLIDEFS_SIM_FIRST", "0"))
COUNT = int(os.environ.get("GLIDEFS_SIM_SEEDS") or {"quick": 60, "long": 10_000}.get(LENGTH, 500))
AT_ONCE = 20
IDENTITY_COUNT = int(os.environ.get("GLIDEFS_SIM_SEEDS") or {"quick": 40, "long": 2_000}.get(LENGTH, 100))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of this run, that of all its processes: what happened in the seeds that were run."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "simulated"
    place.mkdir(exist_ok=True)
    return place


def run(seed: int, *, identity: bool = False) -> Counter[str]:
    """What happened in one seed; if it fails, once more with a trace."""
    try:
        return Counter(simulate(seed, identity=identity).counts)
    except Exception as error:
        simulate(seed, keep_trace=True, identity=identity)
        raise AssertionError(f"seed {seed} failed, and not when it was run again: {error}") from error


def happened(told: Path, first: int, count: int, *, identity: bool = False) -> Counter[str]:
    """What happened in the seeds of one test, which are run unless a process of this run has done so."""
    file = told / f"{'identity-' * identity}{first}"
    if file.exists():
        return Counter(json.loads(file.read_text()))
    counts: Counter[str] = Counter()
    for seed in range(first, min(first + AT_ONCE, FIRST + count)):
        counts.update(run(seed, identity=identity))
    own = file.with_suffix(f".{os.getpid()}")
    own.write_text(json.dumps(counts))
    own.rename(file)
    return counts


@pytest.mark.parametrize("seed", sorted(REGRESSIONS))
def test_a_seed_that_failed_once(seed: int) -> None:
    run(seed)


@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, AT_ONCE))
def test_seeds(told: Path, first: int) -> None:
    assert happened(told, first, COUNT)


@pytest.mark.parametrize("seed", sorted(IDENTITY_REGRESSIONS))
def test_a_seed_of_clones_and_stores_that_failed_once(seed: int) -> None:
    run(seed, identity=True)


@pytest.mark.parametrize("first", range(FIRST, FIRST + IDENTITY_COUNT, AT_ONCE))
def test_seeds_of_clones_and_stores(told: Path, first: int) -> None:
    """Two hosts of one name, cloned hosts, other stores, and stores that go back in time."""
    assert happened(told, first, IDENTITY_COUNT, identity=True)


@pytest.mark.skipif(IDENTITY_COUNT < 100, reason="not enough seeds")
def test_everything_happened_to_clones_and_stores(told: Path) -> None:
    counts: Counter[str] = Counter()
    for first in range(FIRST, FIRST + IDENTITY_COUNT, AT_ONCE):
        counts.update(happened(told, first, IDENTITY_COUNT, identity=True))
    wanted = {f"step {name}" for name in IDENTITY_WEIGHTS}
    wanted |= {f"cloned {how}" for how in CLONED} | {f"store {kind}" for kind in STORES}
    wanted |= {"hosts of one name", "twin fenced", "store went back", "store brought forward"}
    wanted |= {"older state accepted", "drain StoreWentBack"}
    assert not wanted - set(counts), f"never: {sorted(wanted - set(counts))}"


@pytest.mark.skipif(COUNT < 500, reason="not enough seeds")
def test_everything_happened(told: Path) -> None:
    """! What never happens is not tested: every step, every fault, every way to crash, and what follows."""
    counts: Counter[str] = Counter()
    for first in range(FIRST, FIRST + COUNT, AT_ONCE):
        counts.update(happened(told, first, COUNT))
    wanted = {f"step {name}" for name in WEIGHTS}
    wanted |= {f"store {kind}" for kind in (*KINDS, "down")}
    wanted |= {f"handoff {variant}" for variant in VARIANTS}
    wanted |= {"crash", "power cut", "crash at store", "crash at file", "crash at disk", "crash of gc"}
    wanted |= {"log write ENOSPC", "log write EIO", "log fsync EIO", "log directory fsync EIO"}
    wanted |= {f"file {what} {err}" for what in ("write", "fsync") for err in ("ENOSPC", "EIO")}
    wanted |= {"gc to its end", "verb worked", "verb failed"}
    assert not wanted - set(counts), f"never: {sorted(wanted - set(counts))}"


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("seed", [FIRST + 1, FIRST + 2, FIRST + 3])
def test_a_seed_is_the_same_every_time(seed: int, identity: bool) -> None:
    """In another process too, whose sets are in another order."""
    here = simulate(seed, identity=identity).digest
    for hash_seed in ("1", "2"):
        environment = dict(os.environ, PYTHONHASHSEED=hash_seed)
        command = [sys.executable, "-m", "tests.sim.run", str(seed)] + ["--identity"] * identity
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True
        )
        assert f"seed {seed}: ok, {here[:16]}" in done.stdout


def test_half_a_record_of_others_is_read_when_it_is_whole(tmp_path: Path) -> None:
    """The core writes a record of the trace in two pieces; another thread may look between them."""
    platter = Platter(tmp_path)
    try:
        trace(None)
        theirs = _record(CREATE, "/elsewhere/a") + _record(WRITE, "/elsewhere/a", bytes(SECTOR))
        ours = _record(CREATE, f"{tmp_path}/b")
        for cut in range(1, len(theirs) + len(ours), 97):
            at = len(platter.steps())
            with open(tmp_path / "trace", "ab") as file:
                file.write((theirs + ours)[:cut])
                file.flush()
                assert len(platter.steps()) == at
                file.write((theirs + ours)[cut:])
            assert platter.steps()[at:] == [platter.position()]
    finally:
        platter.close()


def _record(kind: int, path: str, data: bytes = b"") -> bytes:
    return HEAD.pack(kind, 0, len(path), 0, 0, len(data)) + path.encode() + data


def test_what_other_tests_left_running_changes_nothing() -> None:
    """In a process of its own: what else this one has had is not known."""
    command = [sys.executable, "-m", "tests.sim.left_behind", str(FIRST + 2)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
