"""Hash tables of the core depend on a secret of the process: nobody can choose keys that collide."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from core_rig import SANITIZED

from glidefs.core._core import lib

PROGRAM = "from glidefs.core._core import lib; print([lib.glide_hash(key) for key in range(64)])"


@pytest.mark.skipif(SANITIZED, reason="another process does not load a sanitizer's build of the core")
def test_each_process_has_its_own_places() -> None:
    seen = {subprocess.check_output([sys.executable, "-c", PROGRAM]) for _ in range(3)}
    assert len(seen) == 3


@pytest.mark.parametrize("stride", [1, 32, 1024, 1 << 20, 1 << 32, (1 << 32) + 1])
@pytest.mark.parametrize("shift", [0, 59])
def test_keys_of_any_stride_are_spread(stride: int, shift: int) -> None:
    """In the low bits, which choose the place in a part of a table, and in those that choose the part."""
    places = 1024 if shift == 0 else 32
    count = 16 * places
    found = Counter(lib.glide_hash(key * stride) >> shift & (places - 1) for key in range(count))
    assert max(found.values()) < 16 * 4
    assert len(found) == places
