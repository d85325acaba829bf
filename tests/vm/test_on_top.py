"""What people put on a device: LVM, LUKS, btrfs, a container, a memory image of virtual machines.

docs/tutorials/on-top.md has the commands; each is used here as it stands there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for

pytest.importorskip("glidefs.core._core")
import device_rig as rig
from device_kinds import KINDS, create, need, need_module
from handoff_rig import Generations
from node import MIB

from glidefs.transport.device.use import device_use

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(3600 if rig.EMULATED else 900),
    pytest.mark.parametrize("kind", KINDS),
]
LVM_ALONE = "activation{udev_sync=0 udev_rules=0} devices{obtain_device_list_from_udev=0}"
"""The VM of the tests has no udev, and LVM would wait for it."""
FILES = 8 * MIB


def survives(node: Generations, device: str, mkfs: list[str], check: list[str]) -> None:
    """Real files on ``device``, through a kill and a handoff of the daemon while they are written."""
    before = len(rig.kernel_log())
    names = rig.real_files(FILES, ("/usr/share/perl", "/usr/lib"))
    (node.base / "names").write_text("\n".join(names))
    rig.run(*mkfs, device)
    with rig.mounted(device, node.base / "mnt") as at:
        for act in (lambda: (node.kill(), node.start()), node.handoff):
            copied = subprocess.Popen(
                ["bash", "-c", f"tar -C / -cf {at}/all.tar -T {node.base}/names && sync {at}/all.tar"],
                stderr=subprocess.DEVNULL,
            )
            time.sleep(0.5)
            act()
            assert copied.wait(rig.STEP) == 0
        want = hashlib.sha256((at / "all.tar").read_bytes()).hexdigest()
    rig.drop_caches()
    with rig.mounted(device, node.base / "mnt") as at:
        assert hashlib.sha256((at / "all.tar").read_bytes()).hexdigest() == want
    rig.run(*check, device)
    assert rig.io_errors(before) == []


def moved(node: Generations, kind: str, *names: str) -> list[str]:
    """Detached, the host's disk lost, attached: the devices then."""
    for name in names:
        node.json("detach", name)
    node.stop()
    node.wipe()
    node.start()
    return [str(node.json("attach", name, "--transport", kind)["device"]) for name in names]


def test_btrfs(node: Generations, kind: str) -> None:
    need("mkfs.btrfs")
    device = create(node, kind, "tree", "1GiB")
    survives(node, device, ["mkfs.btrfs", "-q"], ["btrfs", "check", "--readonly"])
    with rig.mounted(device, node.base / "mnt") as at:
        rig.run("btrfs", "subvolume", "snapshot", at, at / "snap")
        assert "in use" in node.fails("detach", "tree")
        rig.run("btrfs", "scrub", "start", "-B", at)
        want = rig.run("sha256sum", at / "snap/all.tar").split()[0]
    [device] = moved(node, kind, "tree")
    with rig.mounted(device, node.base / "mnt") as at:
        assert rig.run("sha256sum", at / "snap/all.tar").split()[0] == want


def test_luks(node: Generations, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need("cryptsetup")
    need_module("dm-crypt")
    device = create(node, kind, "secret", "256MiB")
    key = node.base / "key"
    key.write_bytes(os.urandom(32))
    monkeypatch.setenv("DM_DISABLE_UDEV", "1")
    cheap = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    rig.run("cryptsetup", "luksFormat", "-q", *cheap, "--key-file", key, device)

    def unlock(device: str) -> None:
        rig.run("cryptsetup", "open", "--allow-discards", "--key-file", key, device, "plain")

    unlock(device)
    assert "in use by another device" in node.fails("detach", "secret")
    survives(node, "/dev/mapper/plain", ["mkfs.ext4", "-q"], ["e2fsck", "-fn"])
    marker = b"what the store must not know" * 1000
    with rig.mounted("/dev/mapper/plain", node.base / "mnt") as at:
        (at / "marker").write_bytes(marker)
    rig.run("cryptsetup", "close", "plain")
    [device] = moved(node, kind, "secret")
    assert not any(marker[:28] in path.read_bytes() for path in node.store.rglob("*") if path.is_file())
    unlock(device)
    with rig.mounted("/dev/mapper/plain", node.base / "mnt") as at:
        assert (at / "marker").read_bytes() == marker
        rig.run("fstrim", "-v", at)
    rig.run("cryptsetup", "close", "plain")
    node.json("remove", "secret")


def lvm(command: str, *words: str) -> str:
    return rig.run("lvm", command, "--config", LVM_ALONE, *words)


def test_lvm(node: Generations, kind: str) -> None:
    need("lvm")
    need_module("dm-mod")
    first, second = (create(node, kind, name, "256MiB") for name in ("pv1", "pv2"))
    lvm("pvcreate", first, second)
    lvm("vgcreate", "glide", first)
    lvm("lvcreate", "-y", "-Wy", "-Zn", "-n", "data", "-L", "128M", "glide")
    lvm("vgmknodes")
    assert "in use by another device" in node.fails("detach", "pv1")
    survives(node, "/dev/mapper/glide-data", ["mkfs.ext4", "-q"], ["e2fsck", "-fn"])
    lvm("vgextend", "glide", second)
    with rig.mounted("/dev/mapper/glide-data", node.base / "mnt") as at:
        lvm("lvextend", "-L", "320M", "glide/data")
        rig.run("resize2fs", "/dev/mapper/glide-data")
        (at / "large").write_bytes(bytes(200 * MIB))
        want = rig.run("sha256sum", at / "all.tar").split()[0]
    lvm("vgchange", "-an", "glide")
    moved(node, kind, "pv2", "pv1")
    lvm("vgchange", "-ay", "glide")
    lvm("vgmknodes")
    with rig.mounted("/dev/mapper/glide-data", node.base / "mnt") as at:
        assert rig.run("sha256sum", at / "all.tar").split()[0] == want
    rig.run("e2fsck", "-fn", "/dev/mapper/glide-data")
    lvm("vgchange", "-an", "glide")


def test_a_container(node: Generations, kind: str, place: Path) -> None:
    """The device has another name in it, and is in use as long as a process there has it open."""
    need("crun", "busybox")
    device = create(node, kind, "box", "64MiB")
    found = os.stat(device)
    bundle = place / "bundle"
    (bundle / "rootfs/bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", bundle / "rootfs/bin/busybox")
    script = (
        "busybox dd if=/data of=/dev/xvdx bs=4096 count=64 conv=fsync && exec busybox sleep 600 < /dev/xvdx"
    )
    (bundle / "rootfs/data").write_bytes(b"from the container, " * 20_000)
    rig.run("crun", "spec", cwd=bundle)
    spec = json.loads((bundle / "config.json").read_text())
    spec["process"] |= {"terminal": False, "args": ["/bin/busybox", "sh", "-c", script]}
    spec["process"]["env"] = ["PATH=/bin"]
    numbers = {"major": os.major(found.st_rdev), "minor": os.minor(found.st_rdev)}
    spec["linux"]["devices"] = [{"path": "/dev/xvdx", "type": "b", "fileMode": 0o600, **numbers}]
    spec["linux"]["resources"]["devices"].append({"allow": True, "type": "b", "access": "rwm", **numbers})
    spec["linux"]["namespaces"] = [one for one in spec["linux"]["namespaces"] if one["type"] != "network"]
    (bundle / "config.json").write_text(json.dumps(spec))
    ran = subprocess.Popen(
        ["crun", "run", "--bundle", bundle, "box"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        wait_for(lambda: ran.poll() is not None or "busybox" in device_use(device, 0.0), "it has it open")
        refused = node.fails("detach", "box")
        assert f"{device} is open (pid " in refused, refused
        node.kill()
        node.start()
        assert ran.poll() is None
    finally:
        subprocess.run(["crun", "delete", "--force", "box"], check=False)
        said = ran.communicate(timeout=rig.STEP)[1]
    with open(device, "rb") as file:
        wanted = (bundle / "rootfs/data").read_bytes()[: 64 * 4096]
        assert file.read(len(wanted)) == wanted, said
    node.json("detach", "box")


def test_a_memory_image_of_many_machines(node: Generations, kind: str, place: Path) -> None:
    """A paused machine's state, as a base; three machines go on from one read-only device at once."""
    need("qemu-system-x86_64")
    marks = os.urandom(4 * MIB)
    (place / "marks").write_bytes(marks)
    loader = f"loader,file={place}/marks,addr={MIB},force-raw=on"
    with machine(place / "first", "-S", "-device", loader) as first:
        first("migrate", uri=f"exec:cat > {place}/state")
        wait_for(lambda: first("query-migrate").get("status") == "completed", "the state is written")
    os.truncate(place / "state", -(-(place / "state").stat().st_size // MIB) * MIB)
    rig.run(sys.executable, "-m", "glidefs", "bless", place / "state", "--name", "state", "-c", node.config)
    made = node.json("create", "memory", "--from", "base:state", "--read-only", "--transport", kind)
    device = made["device"]
    assert Path(f"/sys/block/{Path(device).name}/ro").read_text() == "1\n"
    with contextlib.ExitStack() as scope:
        asked = [
            scope.enter_context(machine(place / f"{n}", "-incoming", f"exec:cat {device}", "-S"))
            for n in range(3)
        ]
        assert node.handoff()["outcome"] == "succeeded"
        for number, one in enumerate(asked):
            wait_for(lambda one=one: one("query-status")["status"] == "prelaunch", "it has its memory")
            one("pmemsave", val=MIB, size=len(marks), filename=f"{place}/memory{number}")
            assert (place / f"memory{number}").read_bytes() == marks
    node.json("remove", "memory")


@contextlib.contextmanager
def machine(base: Path, *options: str) -> Iterator[Callable[..., Any]]:
    """A machine that does not run, and what asks it over QMP."""
    base.mkdir()
    words = ["qemu-system-x86_64", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"]
    process = subprocess.Popen([*words, "-qmp", f"unix:{base}/qmp,server=on,wait=off", *options])
    try:
        wait_for(lambda: (base / "qmp").exists(), "the machine's socket")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(base / "qmp"))
            stream = connection.makefile("rwb", buffering=0)
            stream.readline()

            def ask(command: str, **arguments: object) -> Any:
                stream.write(json.dumps({"execute": command, "arguments": arguments}).encode())
                while True:
                    answer = json.loads(stream.readline())
                    if "event" not in answer:
                        assert "return" in answer, answer
                        return answer["return"]

            ask("qmp_capabilities")
            yield ask
    finally:
        process.kill()
        process.wait()
