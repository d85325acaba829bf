"""How many examples the machines run, and in what parts: see conftest.py."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

LENGTH = os.environ.get("GLIDEFS_TEST_LENGTH", "normal")
COUNT = os.environ.get("GLIDEFS_MODEL_EXAMPLES")
SEED = os.environ.get("GLIDEFS_MODEL_SEED")
RANDOM = COUNT is not None or LENGTH == "long"
PART = 500
"""Examples of one test at most. Hypothesis keeps what it tried: gigabytes, and ever slower, for 20,000."""


def model_test(
    machine: type[RuleBasedStateMachine], steps: int, *, quick: int, normal: int, long: int
) -> Callable[[int], None]:
    """A test that runs ``machine`` as often as was asked for, at most ``steps`` rules each time.

    More than ``PART`` examples that are random are several tests, which may run side by side and in any
    order. Each has a seed of its own and prints how to repeat it.
    """
    examples = int(COUNT) if COUNT else {"quick": quick, "long": long}.get(LENGTH, normal)
    size = PART if RANDOM else examples

    @pytest.mark.timeout(1200 if examples <= normal else 24 * 3600)
    @pytest.mark.parametrize("part", range(-(-examples // size)))
    def test(part: int) -> None:
        of_part = min(size, examples - part * size)

        class Seeded(machine):  # type: ignore[misc, valid-type]
            pass

        if SEED is not None or RANDOM:
            number = int(SEED) + part if SEED is not None else random.SystemRandom().getrandbits(32)
            print(f"to repeat: GLIDEFS_MODEL_SEED={number} GLIDEFS_MODEL_EXAMPLES={of_part}")
            Seeded._hypothesis_internal_use_seed = number  # what hypothesis.seed() sets
        run_state_machine_as_test(
            Seeded,
            settings=settings(
                settings.get_profile("glidefs-model"), max_examples=of_part, stateful_step_count=steps
            ),
        )

    return test
