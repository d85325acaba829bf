"""Makes the rigs of other tests importable."""

from __future__ import annotations

import sys
from pathlib import Path

for directory in ("forks", "mutations"):
    sys.path.insert(0, str(Path(__file__).parents[1] / directory))
