"""PR_SET_IO_FLUSHER: when memory is short, the daemon's threads must not wait for disks that may be its own.

A guest dirties memory of this host; to free some of it the kernel writes to the guest's device; that write
needs the daemon, and in the end free log space. So every thread between a guest's write and freed log space
(workers, uploads, commits, faults, the control plane that resumes them) must get memory without waiting for
writes, and must not be slowed down for dirtying pages. `PR_SET_IO_FLUSHER` of prctl(2), Linux 5.6, says both
of the calling thread; threads and processes that it starts inherit it. So it is asked for once, before there
is a second thread, and nothing needs to remember it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

_PR_SET_IO_FLUSHER = 57
_PR_GET_IO_FLUSHER = 58
_MEMALLOC_NOIO, _LOCAL_THROTTLE = 0x00080000, 0x00100000
"""Flags of a task (PF_*, include/linux/sched.h) that it sets, as /proc/PID/task/TID/stat shows them."""
REMEDY = "give it CAP_SYS_RESOURCE (run it as root, or see CapabilityBoundingSet in the unit)"


def _prctl(option: int, value: int) -> int:
    """The result, or -errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.prctl(option, value, 0, 0, 0)
    return result if result >= 0 else -ctypes.get_errno()


def become_io_flusher() -> str | None:
    """Mark the calling thread, the only one; why it is not, if it cannot be."""
    result = _prctl(_PR_SET_IO_FLUSHER, 1)
    return os.strerror(-result) if result < 0 else None


def refused() -> str | None:
    """Why this process could not mark its threads. Changes nothing."""
    result = _prctl(_PR_GET_IO_FLUSHER, 0)
    return os.strerror(-result) if result < 0 else None


def count_threads(pid: int | str = "self") -> tuple[int, int]:
    """How many threads of a process are marked, and how many there are. Raises OSError."""
    marked = total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            fields = (task / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            flags = int(fields[6])
            wanted = _MEMALLOC_NOIO | _LOCAL_THROTTLE
            marked += flags & wanted == wanted
            total += 1
    return marked, total
