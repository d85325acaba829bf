"""Guests under QEMU that boot from an export: a real kernel, and a root of this host's files.

The guest's kernel is the one that vm-test caches. Its init starts Python from the disk, reads files
all over it, leaves a file of its own, and powers off; the console says how far it came.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "vm-test"))

import kernels  # noqa: E402

IMAGE_SIZE = 1280 << 20
KERNEL = "6.12"
PATIENCE = 420.0
MEMORY = 512
"""MiB of a guest."""
VHOST_USER = "vhost-user:"
READS = 160
"""Files that the boot reads, in an order that is the same each time."""
MODULES = ("virtio_blk", "crc16", "crc32c_generic", "libcrc32c", "mbcache", "jbd2", "ext4")
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"

INITRAMFS_INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
for module in MODULES; do /bin/busybox insmod /modules/$module.ko; done
while [ ! -b /dev/vda ]; do /bin/busybox sleep 0.05; done
/bin/busybox mount -t ext4 /dev/vda /root || exec /bin/busybox poweroff -f
/bin/busybox mount -o move /dev /root/dev
/bin/busybox mount -o move /proc /root/proc
exec /bin/busybox switch_root /root /sbin/init
"""

ROOT_INIT = """#!/bin/busybox sh
PATH=/bin:/usr/bin
@PYTHON@ -c 'import json, email.parser, http.client, decimal; print("PYTHON IS UP")' > /dev/console
while read file; do cat "$file" > /dev/null; done < /etc/boot-reads
name=$(sed 's/.*guest=\\([^ ]*\\).*/\\1/' /proc/cmdline)
head -c 3000000 /dev/urandom > /srv/$name.data
sha256sum /srv/$name.data > /srv/$name.sum
sync
read uptime rest < /proc/uptime
echo "BOOTED $name $uptime" > /dev/console
umount / 2>/dev/null || mount -o remount,ro /
poweroff -f
"""


class Files(NamedTuple):
    """What a boot needs beside the disk."""

    kernel: Path
    initramfs: Path


def missing() -> str:
    """Why no guest can boot here, if so."""
    for program in ("qemu-system-x86_64", "busybox", "mkfs.ext4", "xz"):
        if shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
            return f"{program} is not installed"
    return ""


def boot_files(where: Path) -> Files:
    """The kernel, and an initramfs with the modules for a virtio disk with ext4."""
    kernel = kernels.fetch(KERNEL)
    tree = where / "initramfs"
    for name in ("bin", "dev", "proc", "root", "modules"):
        (tree / name).mkdir(parents=True)
    shutil.copy2(str(shutil.which("busybox")), tree / "bin/busybox")
    found = {path.name.split(".ko")[0]: path for path in Path(kernel.modules).rglob("*.ko*")}
    used = [module for module in MODULES if module in found]
    for module in used:
        target = tree / "modules" / f"{module}.ko"
        command = (
            ["xz", "-dc", str(found[module])]
            if found[module].suffix == ".xz"
            else ["cat", str(found[module])]
        )
        with target.open("wb") as file:
            subprocess.run(command, stdout=file, check=True)
    init = tree / "init"
    init.write_text(INITRAMFS_INIT.replace("MODULES", " ".join(used)))
    init.chmod(0o755)
    out = where / "initramfs.cpio"
    with out.open("wb") as file:
        subprocess.run("find . | busybox cpio -o -H newc", shell=True, cwd=tree, stdout=file, check=True)
    return Files(Path(kernel.image), out)


def make_image(where: Path) -> Path:
    """An ext4 image of 1.25 GiB with a few hundred megabytes of this host's programs in it."""
    tree = where / "tree"
    for name in ("bin", "sbin", "dev", "proc", "etc", "srv", "usr/bin", "usr/lib", "lib64"):
        (tree / name).mkdir(parents=True)
    shutil.copy2(str(shutil.which("busybox")), tree / "bin/busybox")
    for tool in ("sh", "cat", "sed", "head", "sha256sum", "sync", "mount", "umount", "poweroff"):
        (tree / "bin" / tool).symlink_to("busybox")
    bulk = _copy_programs(tree)
    _copy_python(tree)
    random.Random(7).shuffle(bulk)
    reads = [f"/{path.relative_to(tree)}" for path in bulk[:READS]]
    (tree / "etc/boot-reads").write_text("\n".join([*reads, ""]))
    init = tree / "sbin/init"
    init.write_text(ROOT_INIT.replace("@PYTHON@", f"/usr/bin/{PYTHON}"))
    init.chmod(0o755)
    image = where / "root.img"
    with image.open("wb") as file:
        file.truncate(IMAGE_SIZE)
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-d", str(tree), str(image)], check=True)
    shutil.rmtree(tree)
    return image


def _copy_programs(tree: Path) -> list[Path]:
    """Programs of this host, up to about 250 MB; those small enough for a boot to read."""
    total, small = 0, []
    for path in sorted(Path("/usr/bin").iterdir()):
        if total > 250 << 20 or path.is_symlink() or not path.is_file():
            continue
        size = path.stat().st_size
        target = tree / "usr/bin" / path.name
        shutil.copyfile(path, target)
        total += size
        if 4096 < size < 256 << 10:
            small.append(target)
    return small


def _copy_python(tree: Path) -> None:
    """Python's program, its library, and the shared objects of both."""
    program = tree / "usr/bin" / PYTHON
    source = Path(os.path.realpath(sys.executable))
    shutil.copy2(source, program)
    library = Path(os.__file__).parent
    shutil.copytree(
        library,
        tree / "usr/lib" / PYTHON,
        symlinks=True,
        ignore=shutil.ignore_patterns("site-packages", "dist-packages", "test", "__pycache__"),
    )
    objects = [source, *(library / "lib-dynload").glob("*.so")]
    needed = subprocess.run(["ldd", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    for path in set(re.findall(r"(/\S+\.so[.\d]*)", needed)):
        target = tree / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy2(path, target)
    for name in ("lib", "lib64"):
        if not (tree / name).exists():
            (tree / name).symlink_to(f"usr/{name}")


def disk_options(address: str) -> list[str]:
    """QEMU's options for a disk at the URI of an NBD export, or at ``vhost-user:SOCKET``."""
    if not address.startswith(VHOST_USER):
        return ["-drive", f"file={address},format=raw,if=virtio,cache=none"]
    return [
        *(
            "-object",
            f"memory-backend-memfd,id=ram,size={MEMORY}M,share=on",
            "-machine",
            "memory-backend=ram",
        ),
        *("-chardev", f"socket,id=disk,path={address.removeprefix(VHOST_USER)},reconnect=1"),
        *("-device", "vhost-user-blk-pci,chardev=disk"),
    ]


class Guest:
    """One QEMU with the export at ``address`` as its disk (see ``disk_options``), started at once."""

    def __init__(self, name: str, address: str, files: Files, where: Path) -> None:
        self.name = name
        self.console = where / f"{name}.console"
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [
                "qemu-system-x86_64", "-nodefaults", "-no-reboot", "-display", "none", "-m", str(MEMORY),
                "-kernel", files.kernel, "-initrd", files.initramfs,
                "-append", f"console=ttyS0 quiet panic=-1 no_timer_check guest={name}",
                *disk_options(address),
                "-serial", f"file:{self.console}",
            ],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def wait(self, patience: float = PATIENCE) -> float:
        """Until it has powered itself off; seconds from its start to that. Raises AssertionError."""
        self.process.wait(patience)
        took = time.monotonic() - self.began
        text = self.console.read_text(errors="replace")
        assert "PYTHON IS UP" in text, text[-3000:]
        assert f"BOOTED {self.name} " in text, text[-3000:]
        return took

    def kill(self) -> None:
        """End it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def files_of(image: Path, where: str) -> dict[str, bytes]:
    """The files in one directory of an ext4 image, read with debugfs."""
    listing = _debugfs(image, f"ls -p {where}").decode()
    names = [
        line.split("/")[5] for line in listing.splitlines() if line.startswith("/") and line.count("/") > 5
    ]
    return {name: _debugfs(image, f"cat {where}/{name}") for name in names if name not in (".", "..", "")}


def _debugfs(image: Path, command: str) -> bytes:
    done = subprocess.run(["/sbin/debugfs", "-R", command, str(image)], capture_output=True, check=True)
    return done.stdout
