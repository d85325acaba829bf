"""How many examples the machines run: see conftest.py."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import seed, settings

LENGTH = os.environ.get("GLIDEFS_TEST_LENGTH", "normal")
COUNT = os.environ.get("GLIDEFS_MODEL_EXAMPLES")
SEED = os.environ.get("GLIDEFS_MODEL_SEED")
RANDOM = COUNT is not None or LENGTH == "long"


def sized(case: Any, steps: int, *, quick: int, normal: int, long: int) -> Any:
    """A Hypothesis test case with the number of examples that was asked for."""
    examples = int(COUNT) if COUNT else {"quick": quick, "long": long}.get(LENGTH, normal)
    case.settings = settings(
        settings.get_profile("glidefs-model"), max_examples=examples, stateful_step_count=steps
    )
    if SEED is not None:
        case = seed(int(SEED))(case)
    return pytest.mark.timeout(1200 if examples <= normal else 24 * 3600)(case)
