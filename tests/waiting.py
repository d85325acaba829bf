"""Waiting for something that comes true by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

DEADLINE = 600.0 if os.environ.get("GLIDEFS_VM") else 60.0
"""Seconds that a test waits; where CPUs are emulated everything takes longer."""

T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str = "it comes true", deadline: float = DEADLINE) -> T:
    """Poll until the condition is true; its value. Fails after ``deadline`` seconds."""
    until = time.monotonic() + deadline
    pause = 0.002
    while not (value := condition()):
        assert time.monotonic() < until, f"not within {deadline} s: {what}"
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    return value
