"""Time limits of waits: each request has its own, on any clock, one that began a second ago too."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from core_rig import BLOCK, MIB, SANITIZED, SECTOR, Background, CoreRig
from waiting import wait_for

from glidefs.core.check import Closed, CoreError
from glidefs.errors import StoreUnavailable
from glidefs.writing.scheduler import Scheduler

HOUR_MS = 3_600_000
TICKS = 0.5
"""Seconds in which the worker has looked for late requests several times (TICK_NS)."""


def after(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


def test_a_timeout_fails_only_who_waited_that_long(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(read_timeout_ms=2000)
    vol = rig.vol()

    def read() -> float:
        """After how many seconds it failed; 0 if it did not."""
        began = time.monotonic()
        try:
            assert vol.core.pread(0, SECTOR) == bytes(SECTOR)
        except CoreError as error:
            return time.monotonic() - began if error.errno == errno.EIO else -1.0
        return 0.0

    with rig.hold():
        first = Background(read)
        wait_for(lambda: first.done or vol.core.info().parked == 1, "the first reader waits")
        wait_for(after(1.2), "a later time")
        second = Background(read)  # of the same block
        assert first.result() >= 2.0
    waited = second.result()
    assert waited == 0 or waited >= 2.0  # where this process stood still its time was over, too


def test_a_block_whose_readers_gave_up_is_read_again(make_rig: Callable[..., CoreRig]) -> None:
    rig = make_rig(read_timeout_ms=4000)  # longer than the answer takes in the end
    vol = rig.vol()
    with rig.hold():
        for _ in range(2):  # the second one finds a fault that waits for Python, and joins it
            with pytest.raises(CoreError):
                vol.core.pread(0, BLOCK * 2)
        assert vol.core.info().parked == 0
    assert vol.core.pread(0, BLOCK * 2) == bytes(BLOCK * 2)


@pytest.mark.parametrize("longer_than_the_clock", [True, False])
def test_a_limit_is_no_earlier_on_a_young_clock(
    make_rig: Callable[..., CoreRig], longer_than_the_clock: bool
) -> None:
    uptime = int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1000)
    limit = uptime + HOUR_MS if longer_than_the_clock else HOUR_MS
    if limit >= 1 << 32:
        pytest.skip("this machine has been up for longer than a limit can be")
    rig = make_rig(read_timeout_ms=limit, log_full_timeout_ms=limit, log_limit=4 * 16 * SECTOR)
    vol = rig.vol()
    with rig.hold():
        reader = Background(lambda: vol.core.pread(8 * MIB, SECTOR))
        writer = Background(lambda: vol.core.pwrite(0, b"x" * MIB))  # more than the log takes
        wait_for(lambda: vol.core.info().parked == 2, "both wait")
        wait_for(after(TICKS), "looks at the clock")
        assert not reader.done
        assert not writer.done
    assert reader.result() == bytes(SECTOR)
    vol.close()
    with pytest.raises(Closed):
        writer.result()


def test_the_first_trouble_is_said_on_a_young_clock(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1.0)
    scheduler = Scheduler(*cast(Any, [SimpleNamespace(life=None)] * 5))
    with caplog.at_level(logging.WARNING):
        scheduler._say(cast(Any, SimpleNamespace(name="v")), StoreUnavailable("away"))
    assert "not uploaded yet" in caplog.text
    caplog.clear()


@pytest.mark.skipif(SANITIZED, reason="another process does not load a sanitizer's build of the core")
def test_all_of_this_a_second_after_boot() -> None:
    """The file again, in a time name space whose monotonic clock begins at 0."""
    if os.environ.get("GLIDEFS_TEST_YOUNG_CLOCK"):
        pytest.skip("this is that run")
    inside = ["unshare", "--time", "--fork", f"--monotonic=-{int(time.monotonic())}"]
    probe = subprocess.run([*inside, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no time name space here: {probe.stderr.strip()}")
    done = subprocess.run(
        [*inside, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))],
        env={**os.environ, "GLIDEFS_TEST_YOUNG_CLOCK": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
