"""Shadow verify in a daemon: guests over NBD, metrics, and the line in the log."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from daemon_harness import Daemon
from open_files import open_below
from waiting import wait_for

pytest.importorskip("glidefs.core._core")

SHADOW = '[debug]\nshadow_dir = "shadow"'


def test_off_by_default(daemon: Daemon) -> None:
    daemon.run("create", "vm1", "--size", "64MiB", "--transport", "nbd")
    daemon.io("vm1", "write -P 1 0 1M", "read -P 1 0 1M")
    assert daemon.samples("glidefs_shadow_compared_sectors_total") == []


def test_guests_are_compared_and_a_difference_is_named(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(extra=SHADOW).start()
    daemon.run("create", "vm1", "--size", "64MiB", "--transport", "nbd")
    daemon.io("vm1", "write -P 1 0 1M", "write -P 2 1M 512", "write -z 2M 1M")
    daemon.run("drain", "vm1")
    daemon.kill()
    daemon.start()

    def guest(number: int) -> None:
        own = f"{8 + number}M 96k"
        mine = [f"write -P {number} {own}", f"read -P {number} {own}"]
        daemon.io("vm1", *["read -P 1 0 512k", *mine, "read -P 0 2M 1M"] * 2)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(guest, range(4)))
    assert daemon.samples("glidefs_shadow_differences_total", export="vm1") == [0]
    assert daemon.total("glidefs_shadow_compared_sectors_total") >= 8 * (128 + 24 + 256)
    assert daemon.samples("glidefs_shadow_skipped_sectors_total", export="vm1", why="absent") == [0]
    assert "SHADOW DIFFERENCE" not in daemon.log_text

    daemon.io("vm1", "write -P 9 512k 64k")
    (segment,) = [
        path
        for path in (daemon.base / "cache" / "logs").glob("*/*/*.seg")
        if b"\t" * 65536 in path.read_bytes()
    ]
    assert daemon.process is not None
    with open_below(daemon.process.pid, daemon.base / "shadow").open("r+b") as file:
        file.seek(129 * 4096 + 11)
        file.write(b"\4")
    assert daemon.has("vm1", 9, "512k", "64k"), "it changes no reply"
    wait_for(lambda: "SHADOW DIFFERENCE" in daemon.log_text, "the difference is logged")
    (line,) = [line for line in daemon.log_text.splitlines() if "SHADOW DIFFERENCE" in line]
    assert "volume vm1: " in line
    assert "block 4, sector 1 of it (sector 129 of the volume)" in line
    assert f"first at byte 11 of the sector (offset {129 * 4096 + 11})" in line
    assert f"log segment {int(segment.stem, 16)} ({segment.name}), position " in line
    assert "it is intact" in line
    assert daemon.total("glidefs_shadow_differences_total") == 1
