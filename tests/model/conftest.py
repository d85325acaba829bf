"""Shared set-up of the model tests: the rigs of other tests, and the Hypothesis profile.

By default examples are the same in every run, and nothing is kept between runs. ``GLIDEFS_TEST_LENGTH``
(quick, normal, long) or ``GLIDEFS_MODEL_EXAMPLES`` say how many; long runs and counts of one's own are
random, and ``GLIDEFS_MODEL_SEED`` repeats one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings

TESTS = Path(__file__).parents[1]
for directory in ("core", "volume", "forks", "gc", "nbd"):
    sys.path.insert(0, str(TESTS / directory))

from model_length import RANDOM  # noqa: E402

settings.register_profile(
    "glidefs-model",
    deadline=None,
    derandomize=not RANDOM,
    database=None,
    print_blob=True,
    report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
