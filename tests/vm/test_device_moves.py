"""Devices that move between two engines of one process, again and again, while guests write.

What a handoff does to the kernel's driver, without the seconds that a daemon takes to start.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("glidefs.core._core")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))

import device_rig as rig
from core_rig import MIB, CoreRig, Vol
from node import fio_command

from glidefs.core import handoff
from glidefs.core.ublk import UblkConfig, UblkDevice

pytestmark = [
    pytest.mark.skipif(rig.REASON is not None, reason=str(rig.REASON)),
    pytest.mark.root,
    pytest.mark.timeout(3600 if rig.EMULATED else 600),
]

MOVES = int(os.environ.get("GLIDEFS_MOVES", "40"))
DEVICES = 3
SIZE = 16 * MIB
LIMITS: dict[str, Any] = {"segment_bytes": 8 * MIB, "log_limit": 2048 * MIB}


def load(device: str, directory: Path, seed: int) -> subprocess.Popen[bytes]:
    job = ["--rw=randwrite", "--bs=4k", "--iodepth=8", f"--size={SIZE}", f"--randseed={seed}"]
    job += ["--verify=crc32c", "--do_verify=1", "--verify_backlog=64", "--verify_fatal=1"]
    job += ["--verify_state_save=0"]
    job += ["--time_based", "--runtime=36000", "--rate_iops=150"]
    with (directory / f"fio{seed}.log").open("w") as output:
        return subprocess.Popen(fio_command(device, *job), stdout=output, stderr=output)


def warm(place: Path, old: list[Vol]) -> tuple[CoreRig, list[Vol]]:
    new = CoreRig(place, standby=True, **LIMITS)
    vols = [Vol(new, vol.dir, vol.config["size"], **vol.config_without_size()) for vol in old]
    return new, [vol.open(standby=True) for vol in vols]


Served = tuple[CoreRig, list[Vol], list[UblkDevice]]


def move(place: Path, old: CoreRig, vols: list[Vol], devices: list[UblkDevice]) -> tuple[Served, float]:
    """The new ones, and how long guests waited, in seconds."""
    new, nexts = warm(place, vols)
    began = time.monotonic()
    positions = [handoff.freeze(vol.core) for vol in vols]
    handoff.give_cache(old.engine)
    old.engine.end_workers()
    recovered = []
    for vol, position, device in zip(nexts, positions, devices, strict=True):
        handoff.activate(vol.core, position)
        handoff.unfreeze(vol.core)
        recovered.append(vol.core.start_ublk(UblkConfig(dev_id=device.dev_id, tag=7, recover=True)))
        vol.config.pop("standby")
    handoff.take_cache(new.engine)
    stall = time.monotonic() - began
    for device in devices:
        device.release()
    old.close()
    return (new, nexts, recovered), stall


def test_devices_move_under_load() -> None:
    """Linux 6.12 lost requests once in twenty of these, or oopsed: see worker_join and wait_quiesced."""
    with rig.scratch() as place, rig.no_leftovers():
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # every move leaves a segment
        now = CoreRig(place, **LIMITS)
        vols = [now.vol(SIZE) for _ in range(DEVICES)]
        devices = [vol.core.start_ublk(UblkConfig(tag=7)) for vol in vols]
        before = len(rig.kernel_log())
        jobs = [load(device.path, place, seed) for seed, device in enumerate(devices, 1)]
        stalls = []
        try:
            for number in range(MOVES):
                (now, vols, devices), stall = move(place, now, vols, devices)
                stalls.append(stall)
                print(f"move {number + 1}: {stall * 1e3:.1f} ms", flush=True)
                assert all(job.poll() is None for job in jobs), (place / "fio1.log").read_text()
                time.sleep(0.01 * (number % 10))
        finally:
            for job in jobs:
                job.terminate()
        for job in jobs:
            assert job.wait(rig.STEP) in (0, 128)
        for device in devices:
            device.close()
        now.close()
        assert rig.io_errors(before) == []
        print(f"stalls: {[round(stall * 1e3) for stall in sorted(stalls)]} ms")
