"""Where the modules of the simulation are: here, and in the rigs of other tests."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
for directory in ("core", "volume", "forks", "gc", "model"):
    sys.path.insert(0, str(TESTS / directory))
