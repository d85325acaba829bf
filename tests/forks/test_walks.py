"""The three walks that ARCHITECTURE.md tells, traced: files in the order in which each is entered first."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from fork_rig import MIB, Node
from waiting import wait_for

from glidefs.store.file import FileStore

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = f"{ROOT / 'glidefs'}/"
LEFT_OUT = ("core/", "formats/", "store/", "names.py", "clock.py", "config.py")


def told(title: str) -> list[str]:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    part = text.split("## Three walks")[1].split("\n## ")[0]
    steps = part.split(f"**{title}")[1].split("\n**")[0]
    numbered = re.findall(r"^\d+\. .*$", steps, re.M)
    found: list[str] = []
    for line in numbered:
        # A step is its first file; a line may have two steps.
        found += re.findall(r"(?:^|, | and )\d+\. `([\w/]+\.py)`", line)
    return found


class Tracer:
    """Files of the package in the order of the first call into each, on threads with one of the names.

    From the first call into the file where the walk begins: threads that wait look around now and then.
    """

    def __init__(self) -> None:
        self.threads: tuple[str, ...] = ()
        self.begin = ""
        self.files: list[str] = []

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if event != "call" or not self.threads or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        name = frame.f_code.co_filename.removeprefix(PACKAGE)
        if name in self.files or name.startswith(LEFT_OUT) or (not self.files and name != self.begin):
            return
        if threading.current_thread().name.startswith(self.threads):
            self.files.append(name)

    @contextmanager
    def walk(self, begin: str, *threads: str) -> Iterator[list[str]]:
        self.files, self.begin, self.threads = [], begin, threads
        sys.setprofile(self)
        try:
            yield self.files
        finally:
            sys.setprofile(None)
            self.threads = ()


@pytest.fixture
def tracer() -> Iterator[Tracer]:
    tracer = Tracer()
    threading.setprofile(tracer)  # of the threads that a node starts
    yield tracer
    threading.setprofile(None)


def settled(node: Node, name: str) -> None:
    """All is in the store, and nothing here."""
    node.router.drain(name)
    volume = node.router.table.get(name).volume
    assert volume is not None
    volume.retire_committed()
    node.engine.cache.evict_all()
    wait_for(lambda: not node.host.scheduler.writers(), "no upload")
    time.sleep(0.5)


def write_and_drain(node: Node) -> None:
    node.core("a").pwrite(8 * MIB, b"y" * 4096)
    node.router.drain("a")
    time.sleep(0.2)


WALKS: dict[str, tuple[tuple[str, ...], Callable[[Node], object]]] = {
    "A cold read of 4 KiB": (("glide-fault",), lambda node: node.core("a").pread(0, 4096)),
    "The same without the core": (("glide-fault",), lambda node: node.core("a").pread(0, 4096)),
    "A sealed segment becomes a commit": (("glide-upload", "glide-put"), write_and_drain),
    "`create --from base:x`": (("MainThread",), lambda node: node.fork("f", "base:deb")),
}


@pytest.fixture
def file_node(tmp_path: Path) -> Iterator[Node]:
    """On a store that the core can read."""
    with FileStore(tmp_path / "store", create=True) as store:
        node = Node(tmp_path / "n", store)  # type: ignore[arg-type]
        yield node
        node.close()


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_is_as_it_is_told(tracer: Tracer, request: pytest.FixtureRequest, title: str) -> None:
    node: Node = request.getfixturevalue("file_node" if title.startswith("A cold read") else "node")
    node.router.start()
    assert node.router.wait_tried(20)
    node.create("a", 64 * MIB, wait=True)
    node.core("a").pwrite(0, b"x" * MIB)
    node.base("deb", b"q" * 4096, 16 * MIB)
    settled(node, "a")
    threads, walk = WALKS[title]
    steps = told(title)
    with tracer.walk(steps[0], *threads) as files:
        walk(node)
        wait_for(lambda: len(files) >= len(steps), f"{files}, not {steps}")
    assert files == steps
