"""Disks that fail, lie or are small, and a guest that checks all it reads."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path

from nbd_client import RawClient, RequestFailed
from node import MIB
from waiting import wait_for

SECTOR = 4 << 10
BLOCK = 128 << 10
SIZE = 256 * MIB


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@contextlib.contextmanager
def mounted(at: Path, *options: str | Path) -> Iterator[Path]:
    at.mkdir(parents=True, exist_ok=True)
    run("mount", *options, at)
    try:
        yield at
    finally:
        run("umount", "-l", at)


def why_not() -> str:
    """Why this host cannot mount such disks; empty if it can."""
    if os.geteuid() != 0:
        return "needs root to mount file systems"
    found = subprocess.run(["losetup", "-f"], capture_output=True, check=False)
    return "" if found.returncode == 0 else "no loop devices here"


class BadDisk:
    """A file system of 256 MiB that can go bad and be well again. It is at ``at``."""

    def __init__(self, base: Path) -> None:
        base.mkdir(parents=True)
        self.base = base
        self.at = base / "mounted"

    @contextlib.contextmanager
    def mount(self) -> Iterator[BadDisk]:
        """The disk, well."""
        with self.image() as image:
            run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard", image)
            with mounted(self.at, "-o", "loop,errors=continue", image):
                yield self

    @contextlib.contextmanager
    def image(self) -> Iterator[Path]:
        """A file of the disk's size, on something that can go bad."""
        raise NotImplementedError

    def go_bad(self, chance: random.Random) -> None:
        """From now on the disk fails."""
        raise NotImplementedError

    def be_well(self) -> None:
        """From now on it does not."""
        raise NotImplementedError

    def write_back(self) -> None:
        """Write back what is dirty, and forget pages: what could not be written is lost."""
        fd = os.open(self.at, os.O_RDONLY)
        CDLL(None).syncfs(fd)  # its error is the daemon's to find
        os.close(fd)
        for path in self.data_files():
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)

    def data_files(self) -> list[Path]:
        """Segments, and the block cache's file of slots."""
        # What os.walk cannot read it leaves out.
        found = (Path(at, name) for at, _, names in os.walk(self.at) for name in names)
        return sorted(path for path in found if path.suffix == ".seg" or path.name == "blocks.data")


class ThinDisk(BadDisk):
    """Overbooked, on a tmpfs of 32 MiB: when that is full, what is written back is lost with an error."""

    @contextlib.contextmanager
    def image(self) -> Iterator[Path]:
        with mounted(self.base / "below", "-t", "tmpfs", "-o", "size=32m", "tmpfs") as below:
            image = below / "image"
            with image.open("wb") as file:
                file.truncate(SIZE)
            yield image

    def go_bad(self, chance: random.Random) -> None:
        left = chance.choice([1, 2, 4]) << 20
        room = os.statvfs(self.base / "below")
        with (self.base / "below" / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_frsize - left))

    def be_well(self) -> None:
        (self.base / "below" / "ballast").unlink(missing_ok=True)


class DyingDisk(BadDisk):
    """Some of its reads and writes fail: nbdkit's error filter, made a file by nbdfuse."""

    @contextlib.contextmanager
    def image(self) -> Iterator[Path]:
        image, socket, pid = self.base / "image", self.base / "sock", self.base / "pid"
        image.touch()
        run("nbdkit", "-U", socket, "-P", pid, "--filter=error", "memory", f"{SIZE}", "error=EIO",
            "error-rate=10%", f"error-file={self.base / 'bad'}")  # fmt: skip
        try:
            fuse = subprocess.Popen(
                ["nbdfuse", image, f"nbd+unix:///?socket={socket}"], stderr=subprocess.DEVNULL
            )
            try:
                wait_for(lambda: image.stat().st_size == SIZE, "the image is there")
                yield image
            finally:
                run("umount", "-l", image)
                fuse.wait(20)
        finally:
            os.kill(int(pid.read_text()), signal.SIGTERM)

    def go_bad(self, chance: random.Random) -> None:
        (self.base / "bad").touch()

    def be_well(self) -> None:
        (self.base / "bad").unlink(missing_ok=True)


class LyingDisk(BadDisk):
    """It has something else now where data was, and says nothing."""

    @contextlib.contextmanager
    def image(self) -> Iterator[Path]:
        image = self.base / "image"
        with image.open("wb") as file:
            file.truncate(SIZE)
        yield image

    def go_bad(self, chance: random.Random) -> None:
        self.chance: random.Random | None = chance

    def be_well(self) -> None:
        self.chance = None

    def write_back(self) -> None:
        super().write_back()
        if self.chance:
            self.rot(self.chance)

    def rot(self, chance: random.Random) -> None:
        """Other bytes in one of eight sectors of data that the disk holds."""
        for path in self.data_files():
            with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
                size = path.stat().st_size
                begin = (size // 64 + SECTOR) // SECTOR * SECTOR  # a segment's journal is before that
                for at in range(begin, size, SECTOR):
                    if chance.random() < 0.125 and os.pread(file.fileno(), SECTOR, at).strip(b"\0"):
                        os.pwrite(file.fileno(), chance.randbytes(SECTOR), at)


KINDS = {"thin": ThinDisk, "dying": DyingDisk, "lying": LyingDisk}


class Guest:
    """Writes stamped blocks and knows what each must be. ``unsent``: blocks that the store may not have."""

    def __init__(self, client: RawClient, blocks: int, seed: int) -> None:
        self.client = client
        self.random = random.Random(seed)
        self.blocks = blocks
        self.version = dict.fromkeys(range(blocks), 0)
        self.unsent: set[int] = set()
        self.gone: dict[int, int] = {}
        """Blocks that were an error, and of which version."""
        self.reads = self.writes = self.lost = 0

    def data(self, block: int) -> bytes:
        version = self.version[block]
        return random.Random(version << 20 | block).randbytes(BLOCK) if version else bytes(BLOCK)

    def write(self, block: int) -> None:
        self.version[block] += 1
        self.unsent.add(block)
        self.client.pwrite(block * BLOCK, self.data(block))
        self.writes += 1

    def check(self, block: int) -> bool:
        """Read a block: right, or an error if it was not sent. False: the error."""
        self.reads += 1
        try:
            found = self.client.pread(block * BLOCK, BLOCK)
        except RequestFailed as error:
            if error.errno != errno.EIO or block not in self.unsent:
                raise AssertionError(f"block {block}, unsent {block in self.unsent}: {error}") from error
            self.lost += 1
            self.gone[block] = self.version[block]
            return False
        assert found == self.data(block), self.explain(block, found)
        return True

    def check_gone(self) -> None:
        """What was an error is one for good, unless it was written since: the data is gone."""
        for block, version in self.gone.items():
            if version == self.version[block]:
                assert not self.check(block), f"block {block} was an error and is there"

    def explain(self, block: int, found: bytes) -> str:
        """Whose data each wrong sector has."""
        now, known = self.version[block], {bytes(4096): "zeros"}
        for other in range(self.blocks):
            for version in range(1, self.version[other] + 1):
                data = random.Random(version << 20 | other).randbytes(BLOCK)
                for at in range(0, BLOCK, 4096):
                    known[data[at : at + 4096]] = f"block {other} version {version} sector {at // 4096}"
        lines = [f"wrong data in block {block} of version {now}, unsent {block in self.unsent}:"]
        right = self.data(block)
        for at in range(0, BLOCK, 4096):
            if found[at : at + 4096] != right[at : at + 4096]:
                lines.append(f"sector {at // 4096}: {known.get(found[at : at + 4096], 'something else')}")
        return "\n".join(lines)

    def flush(self) -> bool:
        try:
            self.client.flush()
        except RequestFailed:
            return False
        return True
