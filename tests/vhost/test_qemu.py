"""QEMU's own front-end: its firmware boots from an export, and copies sectors while daemons come and go.

The boot sector is machine code, assembled here by hand: it copies sectors, from number 1 on, to COPY sectors
behind each, by INT 13h, and ends QEMU.
"""

from __future__ import annotations

import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from core_rig import BLOCK, MIB, pattern
from handoff_rig import Generations
from test_daemons import SETTINGS
from vhost_rig import VhostRig
from waiting import wait_for

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")

COPY = 32768
DONE = (ord("O") << 1) | 1
"""QEMU's status when the guest says so."""


def boot_sector(sectors: int) -> bytes:
    """Real mode, at 0x7c00; DL is the drive. The address packet lies at `packet`."""
    packet = 0x7C00 + 0x100
    lba = packet + 8
    code = bytearray()
    code += b"\x31\xc0\x8e\xd8\x8e\xd0\xbc\x00\x7c"  # xor ax,ax; mov ds,ax; mov ss,ax; mov sp,0x7c00
    again = len(code)
    code += b"\xbe" + struct.pack("<H", packet) + b"\xb4\x42\xcd\x13"  # mov si,packet; mov ah,0x42; int 0x13
    code += b"\x72\x00"  # jc failed
    jumps = [len(code) - 1]
    code += b"\x81\x06" + struct.pack("<HH", lba, COPY)  # add word [lba],COPY
    code += b"\xbe" + struct.pack("<H", packet) + b"\xb8\x00\x43\xcd\x13"  # mov si,packet; mov ax,0x4300; int
    code += b"\x72\x00"  # jc failed
    jumps.append(len(code) - 1)
    code += b"\x81\x2e" + struct.pack("<HH", lba, COPY)  # sub word [lba],COPY
    code += b"\xff\x06" + struct.pack("<H", lba)  # inc word [lba]
    code += b"\x81\x3e" + struct.pack("<HH", lba, sectors + 1)  # cmp word [lba],sectors + 1
    code += b"\x72" + struct.pack("<b", again - len(code) - 2)  # jb again
    code += b"\xb0O\xba\x01\x05\xee\xf4"  # mov al,'O'; mov dx,0x501; out dx,al; hlt
    for at in jumps:
        code[at] = len(code) - at - 1
    code += b"\xb0F\xba\x01\x05\xee\xf4\xeb\xfd"  # failed: the same with 'F'
    code = code.ljust(0x100, b"\0")
    code += struct.pack("<BBHHHQ", 16, 0, 1, 0x7E00, 0, 1)  # packet: one sector, to 0:0x7e00, from sector 1
    return bytes(code.ljust(510, b"\0") + b"\x55\xaa")


def start(path: str) -> subprocess.Popen[bytes]:
    assert QEMU is not None
    return subprocess.Popen(
        [
            QEMU,
            *("-accel", "tcg", "-m", "64M", "-nodefaults", "-display", "none", "-no-reboot"),
            *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
            *("-machine", "q35,memory-backend=ram"),
            *("-chardev", f"socket,id=disk,path={path},reconnect=1"),
            *("-device", "vhost-user-blk-pci,chardev=disk,num-queues=2,bootindex=1"),
            *("-device", "isa-debug-exit,iobase=0x501,iosize=2"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def end(qemu: subprocess.Popen[bytes], seconds: float = 60) -> int:
    try:
        return qemu.wait(seconds)
    finally:
        qemu.kill()
        qemu.wait()
        assert qemu.stdout is not None
        print(qemu.stdout.read().decode(errors="replace"))


def test_firmware_reads_and_writes(make_vhost: Callable[..., VhostRig]) -> None:
    vhost = make_vhost()
    data = pattern(1, 100 * 512)
    vhost.vol.base[512 * COPY // BLOCK] = pattern(2, BLOCK)
    vhost.vol.core.pwrite(0, boot_sector(100) + data)
    with vhost.rig.hold():  # the first write, to a part of a sector, waits for what is told here
        qemu = start(vhost.path)
        wait_for(lambda: vhost.vol.core.stats().ops[0], "the firmware reads")
        assert vhost.resize(128 * MIB) == "", "QEMU is told"
    assert end(qemu) == DONE
    assert vhost.vol.core.pread(512 * (COPY + 1), len(data)) == data
    wait_for(lambda: vhost.transport.in_use("v") == "", "the end of the session")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Generations]:
    made = Generations(tmp_path / "n", settings=SETTINGS)
    made.start()
    yield made
    made.kill_all()


def test_a_guest_outlives_handoffs_and_crashes(node: Generations, tmp_path: Path) -> None:
    """It copies all the time, one sector after the other: what is there at the end has no gap."""
    sectors = 30000
    data = pattern(1, sectors * 512)
    image = tmp_path / "image"
    image.write_bytes((boot_sector(sectors) + data).ljust(64 * MIB, b"\0"))
    node.run("bless", str(image), "--name", "image")
    node.run("create", "vm", "--from", "base:image", "--transport", "vhost-user")
    path = str(node.json("show", "vm")["device"])
    qemu = start(path)

    def copies() -> None:
        before = node.total("glidefs_operations_total", op="write")
        wait_for(
            lambda: node.total("glidefs_operations_total", op="write") > before + 100,
            f"the guest copies\n{node.log_text}",
            60,
        )
        assert qemu.poll() is None, "it was too fast"

    try:
        copies()
        for _ in range(2):
            assert node.handoff()["outcome"] == "succeeded"
            copies()
        wait_for(lambda: len(node.processes()) == 1, "those before have ended, and with them their locks")
        last = node.pid
        node.stop(signal.SIGKILL, -signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{last}").exists(), "all its threads have ended, too")
        node.start()
        copies()
    finally:
        qemu.kill()
        end(qemu)
    wait_for(lambda: "serving" in node.run("show", "vm").stdout, "the export is served")
    wait_for(lambda: node.run("transport", "vm", "nbd", check=False).returncode == 0, "nobody uses it")
    with node.nbd("vm") as client:
        copied = b"".join(client.pread(512 * (COPY + 1 + at), 100 * 512) for at in range(0, sectors, 100))
    length = len(copied.rstrip(b"\0"))
    count = -(-length // 512)
    assert count > 400
    assert copied[: count * 512] == data[: count * 512]
