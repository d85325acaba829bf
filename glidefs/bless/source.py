"""Raw images as a sequence of blocks that are not zeros: files with their holes, devices, pipes.

Zeros are dropped where they are read: a hole is not read at all, and a block of zeros leaves its place
in the buffer to the next one, so that whoever gets the buffer has work in all of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from glidefs.errors import ConfigError
from glidefs.formats.manifest import MAX_SIZE
from glidefs.formats.pack import BLOCK, SECTOR

UNIT = 512
"""A size is a multiple of this many bytes; what an image lacks to it is read as zeros."""
PIPE_SIZE = 1 << 20
_ZERO_SECTOR = bytes(SECTOR)
_ZERO_BLOCK = bytes(BLOCK)
_NOT_RAW = (
    (b"QFI\xfb", "a qcow2 image", "qemu-img convert -O raw"),
    (b"KDMV", "a VMDK image", "qemu-img convert -O raw"),
    (b"vhdxfile", "a VHDX image", "qemu-img convert -O raw"),
    (b"\x1f\x8b\x08", "compressed with gzip", "gzip -dc"),
    (b"\xfd7zXZ\0", "compressed with xz", "xz -dc"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -dc"),
)


class Image(ABC):
    """An image that is read once, from its beginning, by one thread.

    ``length`` is its stated size in bytes, None for a pipe; ``position`` how far it was read.
    """

    def __init__(self, fd: int, name: str, length: int | None) -> None:
        self.fd = fd
        self.name = name
        self.length = length
        self.position = 0

    def fill(self, plain: memoryview) -> list[int]:
        """Put the next blocks that are not zeros into ``plain``, back to back; returns their numbers.

        ``plain`` has room for whole blocks. None are left once the list is empty. Raises ConfigError
        for an image that cannot be read.
        """
        blocks: list[int] = []
        while room := len(plain) - len(blocks) * BLOCK:
            used = len(plain) - room
            try:
                offset, length = self._read(plain[used:])
            except OSError as error:
                why = f"{self.name}: {error.strerror} at byte {self.position}"
                raise ConfigError(f"{why}; nothing was published") from error
            if not length:
                break
            if offset == 0:
                self._check_raw(plain[used : used + length])
            padding = -length % BLOCK
            plain[used + length : used + length + padding] = bytes(padding)
            _keep(plain, used, offset // BLOCK, (length + padding) // BLOCK, blocks)
        return blocks

    @abstractmethod
    def _read(self, into: memoryview) -> tuple[int, int]:
        """Read the next bytes: their offset in the image, at the start of a block, and their number.

        Less than whole blocks only at the end of the image; 0 after it.
        """

    def end(self) -> int:
        """Once everything was read: the size, a multiple of :data:`UNIT`. Raises ConfigError."""
        if not self.position:
            raise ConfigError(f"{self.name}: there is nothing in it; a base has at least one byte")
        return self.position + -self.position % UNIT

    def _check_raw(self, head: memoryview) -> None:
        for magic, what, how in _NOT_RAW:
            if head[: len(magic)] == magic:
                raise ConfigError(f"{self.name}: this is {what}, not a raw image; make it one with {how}")


class FileImage(Image):
    """A file or a block device of a known size; holes are skipped where the file system shows them."""

    def __init__(self, fd: int, name: str, length: int) -> None:
        super().__init__(fd, name, length)
        self._size = length
        self._extents = self._find_extents()
        self._extent_end = 0
        self._before = _state(fd)
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def _find_extents(self) -> Iterator[tuple[int, int]]:
        """Start and end of what is not a hole, the start at that of a block, none twice."""
        at = 0
        while at < self._size:
            try:
                start = os.lseek(self.fd, at, os.SEEK_DATA)
                end = os.lseek(self.fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                start, end = at, self._size  # a device: it knows no holes
            start -= start % BLOCK
            end = min(end + -end % BLOCK, self._size)
            if start < end:
                yield start, end
            at = end

    def _read(self, into: memoryview) -> tuple[int, int]:
        if self.position >= self._extent_end:
            found = next(self._extents, None)
            if found is None:
                self.position = self._size
                return self._size, 0
            self.position, self._extent_end = found
        start = self.position
        want = min(len(into), self._extent_end - start)
        done = 0
        while done < want:
            count = os.preadv(self.fd, [into[done:want]], start + done)
            if not count:
                raise ConfigError(
                    f"{self.name}: it ends at byte {start + done} of {self._size}, so it became shorter "
                    "while it was read; bless it when nobody writes to it"
                )
            done += count
        self.position = start + done
        return start, done

    def end(self) -> int:
        if _state(self.fd) != self._before:
            raise ConfigError(f"{self.name}: it changed while it was read; bless it when nobody writes to it")
        return super().end()


class StreamImage(Image):
    """A pipe or socket, read up to its end."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd, name, None)
        with contextlib.suppress(OSError):  # more than this user may have, or no pipe
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)

    def _read(self, into: memoryview) -> tuple[int, int]:
        start = self.position
        done = 0
        while done < len(into):
            count = os.readv(self.fd, [into[done:]])
            if not count:
                break
            done += count
        self.position = start + done
        if self.position > MAX_SIZE:
            raise ConfigError(f"{self.name}: more than {MAX_SIZE} bytes, the size of the largest volume")
        return start, done


@contextlib.contextmanager
def open_image(source: Path | int) -> Iterator[Image]:
    """The image in a file or block device, or at an open descriptor, which stays open.

    Raises ConfigError for what is no image or cannot be opened.
    """
    if isinstance(source, int):
        yield _image(source, "standard input" if source == 0 else f"descriptor {source}")
        return
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from error
    try:
        yield _image(fd, str(source))
    finally:
        os.close(fd)


def _image(fd: int, name: str) -> Image:
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            return StreamImage(fd, name)
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "a character device"
            raise ConfigError(f"{name}: it is {kind}; give a raw image, a block device or a pipe")
        if os.lseek(fd, 0, os.SEEK_CUR):
            return StreamImage(fd, name)  # whoever opened it has read a part and wants the rest
        size = os.lseek(fd, 0, os.SEEK_END)
        os.lseek(fd, 0, os.SEEK_SET)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from error
    if size > MAX_SIZE:
        raise ConfigError(f"{name}: {size} bytes, and the largest volume has {MAX_SIZE}")
    return FileImage(fd, name, size)


def _state(fd: int) -> tuple[int, int, int]:
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns, found.st_ino


def _keep(plain: memoryview, used: int, first: int, count: int, blocks: list[int]) -> None:
    """Of ``count`` blocks at ``used``, from number ``first``, close up those that are not zeros."""
    to = used
    for number in range(count):
        at = used + number * BLOCK
        block = plain[at : at + BLOCK]
        # Most blocks of data do not begin with zeros; the others cost a copy and a comparison.
        if block[:SECTOR].tobytes() == _ZERO_SECTOR and block.tobytes() == _ZERO_BLOCK:
            continue
        if to != at:
            plain[to : to + BLOCK] = block
        blocks.append(first + number)
        to += BLOCK
