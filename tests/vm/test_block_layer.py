"""What the kernel's own suites ask of a block driver, of each kind of device of ours.

Written anew after what is checked by blktests (groups ``block``, ``loop``, ``nbd``, ``ublk``) and by the ublk
self-tests of Linux: alignment, flush and FUA, races of open and close, removal and resize under I/O, a
suspended device, partitions, errors.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest
from waiting import wait_for

pytest.importorskip("glidefs.core._core")
import device_rig as rig
from device_kinds import KINDS, REASONS, Direct, create, need, need_module
from handoff_rig import Generations
from node import KIB, MIB, fio_command
from test_device_handoff import Load

from glidefs.core import ublk
from glidefs.transport.nbd_device.driver import LOADED_WITH
from glidefs.transport.ublk.device import F_UPDATE_SIZE

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(3600 if rig.EMULATED else 900),
    pytest.mark.parametrize("kind", KINDS),
]
SEED = int(os.environ.get("GLIDEFS_SEED", str(time.time_ns() % 100_000)))
AWAY = {errno.ENXIO, errno.ENODEV, errno.ENOENT, errno.EIO, errno.EBUSY}
"""What a device that is not there, or ends, may say."""


def test_any_requests_read_like_a_byte_array(node: Generations, kind: str) -> None:
    """Writes, discards and zeroes at the device's own alignment, through detach and attach."""
    size, steps, rng = 4 * MIB, 300, random.Random(SEED)
    print(f"seed {SEED}")
    device = create(node, kind, "any", "4MiB")
    sector = rig.queue_limit(device, "logical_block_size")
    model = bytearray(size)
    disk = Direct(device)
    for step in range(steps):
        length = sector * rng.choice([1, 1, 2, 3, 7, 8, 9, 31, 64, 65, 255])
        offset = sector * rng.randrange((size - length) // sector + 1)
        what = rng.choice(["write", "write", "discard", "zero", "read", "flush"])
        if what == "write":
            data = rng.randbytes(length)
            disk.write(offset, data)
            model[offset : offset + length] = data
        elif what == "discard":
            disk.discard(offset, length)
            model[offset : offset + length] = bytes(length)
        elif what == "zero":
            disk.zero(offset, length)
            model[offset : offset + length] = bytes(length)
        elif what == "flush":
            disk.flush()
        else:
            assert disk.read(offset, length) == model[offset : offset + length], f"step {step} at {offset}"
        if step % 100 == 99:
            disk.close()
            node.json("detach", "any")
            disk = Direct(str(node.json("attach", "any", "--transport", kind)["device"]))
            for at in range(0, size, MIB):
                assert disk.read(at, MIB) == model[at : at + MIB], f"after step {step}"
    disk.close()


def test_what_is_not_aligned_is_refused(node: Generations, kind: str) -> None:
    device = create(node, kind, "odd", "4MiB")
    disk = Direct(device)
    for call in (disk.discard, disk.zero):
        for offset, length in ((100, 4096), (0, 100), (4 * MIB, 4096), (4 * MIB - 4096, 8192)):
            with pytest.raises(OSError, match="Invalid argument"):
                call(offset, length)
    with pytest.raises(OSError, match=r"Invalid argument|No space left"):
        disk.write(4 * MIB, bytes(4096))
    disk.close()


def flushes(device: str) -> int:
    """Flush requests that the device has completed."""
    return rig.counters(device)[15]


def test_a_flush_reaches_the_log(node: Generations, kind: str) -> None:
    """What a guest flushed was synced when it is told so."""
    device = create(node, kind, "safe", "16MiB")
    queue = Path(f"/sys/block/{Path(device).name}/queue")
    assert (queue / "write_cache").read_text().strip() == "write back"
    assert (queue / "fua").read_text().strip() == "1"
    disk = Direct(device)
    for number in range(5):
        seen = flushes(device), log_syncs(node)
        disk.write(number * MIB, os.urandom(4096))
        disk.flush()
        assert flushes(device) == seen[0] + 1
        assert log_syncs(node) > seen[1]
    disk.close()


def test_fua_reaches_the_log(node: Generations, kind: str) -> None:
    """XFS writes over what is there with FUA alone where a file is opened as databases do it."""
    need("mkfs.xfs")
    device = create(node, kind, "safe", "512MiB")
    rig.run("mkfs.xfs", "-q", device)
    with rig.mounted(device, node.base / "mnt") as at:
        (at / "file").write_bytes(bytes(MIB))
        rig.run("sync")
        disk = Direct(str(at / "file"), synced=True)
        before = flushes(device)
        for number in range(20):
            seen = log_syncs(node)
            disk.write(number * 4096, os.urandom(4096))
            assert log_syncs(node) > seen
        assert flushes(device) - before < 10, "they come from the file system's own log"
        disk.close()


def log_syncs(node: Generations) -> int:
    return int(node.total("glidefs_log_syncs_total"))


def test_open_and_close_beside_attach_and_detach(node: Generations, kind: str) -> None:
    device = create(node, kind, "raced", "16MiB")
    link = {"device": device}
    said: set[int] = set()
    reads = [0]
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            try:
                fd = os.open(link["device"], os.O_RDONLY)
            except OSError as error:
                said.add(error.errno or 0)
                time.sleep(0.01)
                continue
            try:
                os.pread(fd, 4096, 0)
                reads[0] += 1
            except OSError as error:
                said.add(error.errno or 0)
            finally:
                os.close(fd)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(10):
            node.json("detach", "raced", "--force")
            link["device"] = str(node.json("attach", "raced", "--transport", kind)["device"])
            wait_for(lambda mark=reads[0]: reads[0] > mark + 3, "it is read again")
    finally:
        ended.set()
        for looker in lookers:
            looker.join(rig.STEP)
    assert not any(looker.is_alive() for looker in lookers)
    assert said <= AWAY, [errno.errorcode[one] for one in said]
    node.json("remove", "raced", "--force")


def test_removal_under_io(node: Generations, kind: str, place: Path) -> None:
    """The writer is told, soon; what it had flushed before is in the volume when it is attached again."""
    device = create(node, kind, "gone", "64MiB")
    disk = Direct(device)
    kept = os.urandom(MIB)
    disk.write(32 * MIB, kept)
    disk.flush()
    disk.close()
    job = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=16M", "--time_based", "--runtime=36000"]
    load = subprocess.Popen(fio_command(device, *job), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: rig.counters(device)[4] > 200, "it writes")
        refused = node.fails("detach", "gone")
        assert f"{device} is open (pid " in refused, refused
        node.json("detach", "gone", "--force")
        said = load.communicate(timeout=120)[0].decode()
        assert load.returncode not in (0, -9), said
    finally:
        load.kill()
        load.wait()
    wait_for(lambda: not Path(device).exists(), "the device goes")
    disk = Direct(str(node.json("attach", "gone", "--transport", kind)["device"]))
    assert disk.read(32 * MIB, MIB) == kept
    disk.close()


def test_resize_under_io(node: Generations, kind: str, place: Path) -> None:
    if kind == "ublk" and not ublk.features() & F_UPDATE_SIZE:
        pytest.skip("this kernel cannot change the size of a ublk device")
    device = create(node, kind, "grows", "64MiB")
    load = Load(device, place, SEED)
    for size in (128, 96, 256, 1024):
        shrink = ["--shrink"] if size == 96 else []
        node.json("resize", "grows", f"{size}MiB", *shrink)
        wait_for(lambda wanted=size * MIB: rig.device_size(device) == wanted, f"{size} MiB")
        disk = Direct(device)
        disk.write(size * MIB - 4096, b"e" * 4096)
        assert disk.read(size * MIB - 4096, 4096) == b"e" * 4096
        disk.close()
        assert load.running
    load.finish()


def writes_on(device: str) -> None:
    mark = rig.counters(device)[4] + 50
    wait_for(lambda: rig.counters(device)[4] > mark, "it is written to")


def test_a_suspended_device_mapper_over_it(node: Generations, kind: str, place: Path) -> None:
    """What is on top stands still while the daemon is killed, started and hands over; then it goes on."""
    need("dmsetup")
    need_module("dm-mod")
    device = create(node, kind, "below", "64MiB")
    sectors = rig.device_size(device) // 512
    rig.run("dmsetup", "create", "over", "--noudevsync", "--table", f"0 {sectors} linear {device} 0")
    try:
        rig.run("dmsetup", "mknodes", "over")
        assert "in use by another device" in node.fails("detach", "below")
        load = Load("/dev/mapper/over", place, SEED)
        for act in (lambda: (node.kill(), node.start()), node.handoff):
            writes_on(device)
            rig.run("dmsetup", "suspend", "over", "--noudevsync")
            act()
            rig.run("dmsetup", "resume", "over", "--noudevsync")
        writes_on(device)
        load.finish()
    finally:
        rig.run("dmsetup", "remove", "--noudevsync", "--retry", "over")


def test_partitions_are_looked_for_when_asked(node: Generations, kind: str) -> None:
    entry = bytes(4) + b"\x83" + bytes(3) + (2048).to_bytes(4, "little") + (8192).to_bytes(4, "little")
    table = bytes(446) + entry + bytes(48) + b"\x55\xaa"
    if kind == "nbd-device":  # the driver as the daemon loads it; the VM did so without options
        rig.run("modprobe", "-r", "nbd")
        rig.run("modprobe", "nbd", *LOADED_WITH)
    device = create(node, kind, "parts", "64MiB")
    with open(device, "r+b") as file:
        file.write(table)
    node.json("detach", "parts")
    device = str(node.json("attach", "parts", "--transport", kind)["device"])
    part = f"{device}p1"
    rig.run("dd", f"if={device}", "of=/dev/null", "bs=4096", "count=1", "status=none")
    assert not Path(part).exists()
    rig.run("partx", "-a", device)
    wait_for(lambda: Path(part).exists(), part)
    assert rig.device_size(part) == 4 * MIB
    with open(part, "r+b"):
        assert f"{device} is open (pid " in node.fails("detach", "parts")
    rig.run("mkfs.ext4", "-q", part)
    with rig.mounted(part, node.base / "mnt"):
        refused = node.fails("detach", "parts")
        assert f"{device} is mounted, or in use by another device" in refused, refused
    rig.run("partx", "-d", device)
    node.json("remove", "parts")
    assert not Path(device).exists()


def test_a_block_that_is_damaged_is_an_error_and_no_other_is(node: Generations, kind: str) -> None:
    """The packs of a volume are damaged in the store, and it is read on a host that has nothing of them."""
    device = create(node, kind, "hurt", "64MiB")
    disk = Direct(device)
    disk.write(0, b"a" * MIB)
    disk.flush()
    disk.close()
    node.json("drain", "hurt")
    packs = {path for path in node.store.rglob("*") if path.is_file() and path.stat().st_size > 4 * KIB}
    disk = Direct(device)
    disk.write(32 * MIB, os.urandom(MIB))
    disk.flush()
    disk.close()
    node.json("drain", "hurt")
    hurt = {p for p in node.store.rglob("*") if p.is_file() and p.stat().st_size > 64 * KIB} - packs
    assert hurt
    for path in hurt:
        data = bytearray(path.read_bytes())
        data[: len(data) // 2] = os.urandom(len(data) // 2)
        path.chmod(0o600)
        path.write_bytes(data)
    node.json("detach", "hurt")
    node.stop()
    node.wipe()
    node.start()
    device = str(node.json("attach", "hurt", "--transport", kind)["device"])
    disk = Direct(device)
    assert disk.read(0, MIB) == b"a" * MIB
    with pytest.raises(OSError, match="Input/output error"):
        disk.read(32 * MIB, 64 * KIB)
    disk.write(32 * MIB, b"b" * 128 * KIB)
    assert disk.read(32 * MIB, 128 * KIB) == b"b" * 128 * KIB
    assert disk.read(0, MIB) == b"a" * MIB
    disk.close()


def test_both_kinds_of_one_host(node: Generations, kind: str) -> None:
    """A volume changes its kind while nobody uses it, and keeps its bytes."""
    if any(REASONS.values()):
        pytest.skip(str(REASONS))
    other = "ublk" if kind == "nbd-device" else "nbd-device"
    device = create(node, kind, "either", "16MiB")
    with open(device, "r+b", buffering=0) as file:
        file.write(b"x" * 4096)
        os.fsync(file.fileno())
        assert "is open" in node.fails("transport", "either", other)
    changed = str(node.json("transport", "either", other)["device"])
    assert changed != device
    assert not Path(device).exists()
    with open(changed, "rb") as file:
        assert file.read(4096) == b"x" * 4096
