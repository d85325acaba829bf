"""The guest's side of test_power_cut_vm: what one boot of the VM does.

    power_cut_guest.py BOOT write|check ublk|nbd-device

The first disk is volatile and holds the daemon's cache directory: log, block cache, records. The second
keeps what it is given and holds a ``file://`` store. Each boot starts the daemon and looks for every file
that any boot before it reported as synced. With ``write`` it then writes more of them until the power goes.

What the host learns goes through the shared directory, at once: ``progress``, a line per step, and
``reports/BOOT-WRITER``, a line per event of a file: ``begin`` before it may come into being, ``done`` once
it must be there.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vm"))

import device_rig as rig
from node import KIB, Node

SHARE = Path(os.environ["GLIDEFS_VM_SHARE"])
REPORTS = SHARE / "reports"
WRITERS = 3
SLOTS = 8
EXPORT = "disk"
SETTINGS = {
    # So small that segments are uploaded, retired and recycled within seconds.
    "cache": {"log_size": '"24MiB"', "segment_size": '"1MiB"', "block_cache_size": '"32MiB"'},
    "upload": {"sync_interval": '"3s"'},
}


class Lines:
    """A file of the shared directory; a line is on the host once it is written."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_SYNC, 0o644)

    def write(self, *words: object) -> None:
        os.write(self._fd, (" ".join(map(str, words)) + "\n").encode())


def write_file(path: Path, data: bytes) -> None:
    """Create a file; its data and its name survive a power cut after this (ext4's fsync has the name too)."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Writer(threading.Thread):
    """Creates files, and replaces a few again and again by rename, until the end of the world."""

    def __init__(self, boot: int, number: int, root: Path) -> None:
        super().__init__(daemon=True)
        self.error: OSError | None = None
        self._boot, self._root = boot, root / f"w{number}"
        self._report = Lines(REPORTS / f"{boot:03}-{number}")
        self._rng = random.Random(os.urandom(8))
        self._bytes = os.urandom(1 << 20)
        self._root.mkdir(exist_ok=True)
        sync_directory(root)

    def run(self) -> None:
        try:
            count = 0
            while True:
                count += 1
                if count % 4:
                    self._create(f"{self._boot}-{count}")
                else:
                    self._replace(f"slot{self._rng.randrange(SLOTS)}", count)
        except OSError as error:
            self.error = error

    def _data(self, name: str, count: int = 0) -> tuple[bytes, str]:
        size = self._rng.choice((1, 4, 12, 48, 48, 300)) * KIB - self._rng.randrange(1000)
        start = self._rng.randrange(len(self._bytes) - size)
        data = f"{name} {self._boot} {count} ".encode() + self._bytes[start : start + size]
        return data, hashlib.sha256(data).hexdigest()

    def _create(self, name: str) -> None:
        data, digest = self._data(name)
        write_file(self._root / name, data)
        self._report.write("done", f"{self._root.name}/{name}", digest)

    def _replace(self, name: str, count: int) -> None:
        data, digest = self._data(name, count)
        self._report.write("begin", f"{self._root.name}/{name}", digest)
        fresh = self._root / f"{name}.tmp"
        fresh.unlink(missing_ok=True)
        write_file(fresh, data)
        fresh.rename(self._root / name)
        sync_directory(self._root)
        self._report.write("done", f"{self._root.name}/{name}", digest)


def expected() -> dict[str, list[str]]:
    """By name the digests that a file may have: the one that was done last, and those begun after it. A
    name that was never done is not in it.
    """
    begun: dict[str, list[str]] = {}
    known: dict[str, list[str]] = {}
    for path in sorted(REPORTS.iterdir()):
        for line in path.read_text().splitlines():
            event, name, digest = line.split(" ")
            if event == "begin":
                begun.setdefault(name, []).append(digest)
                if name in known:
                    known[name].append(digest)
            else:
                begun[name] = []
                known[name] = [digest]
    return known


def compare(root: Path) -> tuple[list[str], dict[str, str]]:
    """What is wrong with the files that were reported, and what each was found to be."""
    wrong: list[str] = []
    found: dict[str, str] = {}
    for name, digests in expected().items():
        try:
            found[name] = hashlib.sha256((root / name).read_bytes()).hexdigest()
        except OSError as error:
            wrong.append(f"{name}: {error.strerror}")
            continue
        if found[name] not in digests:
            wrong.append(f"{name}: other data")
    return wrong, found


def mount_volatile(device: str, at: Path) -> None:
    """The ext4 of the volatile disk, once it was found to be sound itself: it lost in order what it lost."""
    cache = Path(f"/sys/block/{Path(device).name}/queue/write_cache").read_text().strip()
    assert cache == "write back", f"{device} offers no flush: {cache}"
    with rig.mounted(device, at):
        pass
    rig.run("e2fsck", "-f", "-n", device)
    rig.run("mount", device, at)


def serve(node: Node, progress: Lines, transport: str) -> tuple[str, float]:
    """Start the daemon; the device of the export, made by the first boot, and seconds of the start."""
    progress.write("starting")
    began = time.monotonic()
    node.start()
    took = time.monotonic() - began
    if not any(e["name"] == EXPORT for e in node.client.call("GET", "/api/exports")):
        assert not any(REPORTS.iterdir()), "the export is gone"
        made = node.json("create", EXPORT, "--size", "2GiB", "--transport", transport)
        rig.run("mkfs.ext4", "-q", made["device"])
    node.wait_served(EXPORT)
    return str(node.client.call("GET", f"/api/exports/{EXPORT}")["device"]), took


def check(device: str, at: Path, boot: int) -> dict[str, object]:
    """Replay the journal of the file system, compare every file, and check the file system."""
    began = time.monotonic()
    with rig.mounted(device, at):
        wrong, found = compare(at)
    fsck = subprocess.run(["e2fsck", "-f", "-n", device], capture_output=True, text=True, check=False)
    if fsck.returncode:
        wrong.append(f"e2fsck: status {fsck.returncode}: {fsck.stdout}{fsck.stderr}")
    # What is there now has been flushed by umount: a later boot must not find an older one.
    report = Lines(REPORTS / f"{boot:03}-")
    for name, digest in found.items():
        if "/slot" in name:
            report.write("done", name, digest)
    return {"files": len(found), "check": time.monotonic() - began, "wrong": wrong}


def write_until_the_end(writers: Iterable[Writer]) -> None:
    for writer in writers:
        writer.start()
    while True:
        time.sleep(0.2)
        for writer in writers:
            if writer.error is not None:
                raise writer.error


def main(boot: int, write: bool, transport: str) -> None:
    REPORTS.mkdir(exist_ok=True)
    progress = Lines(SHARE / "progress")
    volatile, steady = os.environ["GLIDEFS_VM_DISKS"].split()
    places = {name: Path("/mnt") / name for name in ("cache", "store", "guest")}
    for path in places.values():
        path.mkdir(parents=True)
    mount_volatile(volatile, places["cache"])
    rig.run("mount", steady, places["store"])
    store = {"store": {"url": f'"file://{places["store"]}/objects"'}}
    node = Node(places["cache"] / "n", settings={**SETTINGS, **store})
    before = len(rig.kernel_log())
    device, took = serve(node, progress, transport)
    # Nobody has written yet, and some of it is uploaded by now: what the store has of this start counts, too.
    dirty = node.total("glidefs_dirty_bytes") + node.total("glidefs_store_sent_bytes_total")
    result = {"boot": boot, "start": took, "dirty": dirty, **check(device, places["guest"], boot)}
    result["errors"] = rig.io_errors(before)
    progress.write("checked", json.dumps(result))
    if result["wrong"] or result["errors"]:
        sys.exit(f"boot {boot}: {result}\n{node.log_text}")
    if write:
        rig.run("mount", device, places["guest"])
        writers = [Writer(boot, number, places["guest"]) for number in range(WRITERS)]
        progress.write("writing")
        write_until_the_end(writers)
    node.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "write", sys.argv[3])
