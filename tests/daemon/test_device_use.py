"""Who has a block device open. A loop device stands for a ublk device."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_for

from glidefs.transport.device.use import device_use

PATIENCE = 20.0
"""Seconds that other tests' losetup may look at the device meanwhile."""


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    made = subprocess.run(
        ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device can be had: {made.stderr.strip()}")
    path = made.stdout.strip()
    yield path
    subprocess.run(["losetup", "--detach", path], check=False)


def test_nobody(device: str) -> None:
    assert device_use(device, PATIENCE) == ""
    assert device_use("/dev/no-such-device", 0.0) == ""


def test_a_process_that_has_it_open_is_named(device: str) -> None:
    script = f"import os, sys; os.open({device!r}, os.O_RDONLY); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        # Whoever looks at all block devices of the machine just then is named, too.
        use = device_use(device, 0.0)
        assert use.startswith(f"{device} is open (pid ")
        assert f"pid {process.pid} " in use
        process.communicate(b"")
    assert device_use(device, PATIENCE) == ""


def check_named(device: str, script: str) -> None:
    """A process is named while it runs ``script``: it opens the device, prints a line, reads its input."""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert f"pid {process.pid} " in device_use(device, 0.0)
        process.communicate(b"")
    assert device_use(device, PATIENCE) == ""


def test_a_process_in_a_jail_is_named(device: str, tmp_path: Path) -> None:
    """It opens a node of its own, as Firecracker's jailer makes one."""
    script = f"""
import os, stat, sys
os.mknod("{tmp_path}/disk", stat.S_IFBLK | 0o600, os.stat({device!r}).st_rdev)
os.chroot({str(tmp_path)!r})
os.open("/disk", os.O_RDONLY)
print(flush=True)
sys.stdin.read()
"""
    check_named(device, script)


def test_a_partition_that_is_open_counts(device: str) -> None:
    entry = struct.pack("<8BII", 0, 0, 2, 0, 0x83, 0, 2, 0, 2048, 2048)
    Path(device).write_bytes(bytes(446) + entry + bytes(48) + b"\x55\xaa")
    subprocess.run(["partx", "-a", device], check=False)
    part = f"{device}p1"
    if not Path(part).exists():
        pytest.skip(f"{part} does not appear: no partitions of loop devices here")
    try:
        script = f"import os, sys; os.open({part!r}, os.O_RDONLY); print(flush=True); sys.stdin.read()"
        check_named(device, script)
    finally:
        subprocess.run(["partx", "-d", device], check=False)


def test_who_only_looks_is_waited_for(device: str) -> None:
    script = f"import os; os.open({device!r}, os.O_RDONLY); print(flush=True); os.close(1); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.stdin.close()  # it ends while we wait
        assert device_use(device, 20.0) == ""


def test_an_exclusive_claim_of_the_kernel_counts(device: str) -> None:
    """As a mount, swap or another device has it: of this process, which is not looked at otherwise."""
    claim = os.open(device, os.O_RDONLY | os.O_EXCL)
    said = f"{device} is mounted, or in use by another device"
    try:
        # Whoever looks at it just then, as another test's losetup, is named instead.
        wait_for(lambda: device_use(device, 0.2) == said, said, PATIENCE)
    finally:
        os.close(claim)
    assert device_use(device, PATIENCE) == ""
