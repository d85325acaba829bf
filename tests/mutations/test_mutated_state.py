"""One thing damaged, of every kind, in every way, before every start: right data, or an error that names it.

``GLIDEFS_MUTATIONS`` says how many cases, ``GLIDEFS_MUTATION_SEED`` which; ``GLIDEFS_MUTATION_CASE`` runs one
number of that seed alone. A failure names seed and number. Long runs take a seed of their own.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutation_cases import Case, cases
from mutation_play import Violation, play
from mutation_world import make_world

LENGTH = os.environ.get("GLIDEFS_TEST_LENGTH", "normal")
COUNT = int(os.environ.get("GLIDEFS_MUTATIONS", "2500" if LENGTH == "long" else "180"))
SEED = int(os.environ.get("GLIDEFS_MUTATION_SEED", secrets.randbelow(1 << 31) if LENGTH == "long" else "1"))
ONE = os.environ.get("GLIDEFS_MUTATION_CASE")
PARTS = 1 if ONE is not None or LENGTH == "long" else 6
"""Tests that share the cases, to run side by side."""

SHM = Path("/dev/shm")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """In memory, where there is such a place: no case is about what survives the power."""
    if not os.access(SHM, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=SHM, prefix="glidefs-mutations-") as directory:
        yield Path(directory)


@pytest.mark.timeout(6 * 3600 if LENGTH == "long" else 1200)
@pytest.mark.parametrize("part", range(PARTS))
def test_one_mutation(place: Path, part: int) -> None:
    world = make_world(place)
    violations: list[str] = []
    outcomes: Counter[str] = Counter()
    for case in _chosen()[part::PARTS]:
        began = time.monotonic()
        try:
            outcome = play(world, case, place / "case")
            outcomes["right" if outcome == "right" else "error"] += 1
        except Violation as violation:
            violations.append(str(violation))
            print(f"VIOLATION {violation}", flush=True)
        print(f"{time.monotonic() - began:.2f} {case}", flush=True)
    print(f"seed {SEED}: {dict(outcomes)}, {len(violations)} violations")
    count = COUNT // PARTS
    assert not violations, "\n".join([f"{len(violations)} of {count} cases:", *violations])
    if ONE is None:
        assert outcomes["right"] > count // 5
        assert outcomes["error"] > count // 10


def _chosen() -> list[Case]:
    if ONE is None:
        return list(cases(SEED, COUNT))
    return [case for case in cases(SEED, int(ONE) + 1) if case.number == int(ONE)]
