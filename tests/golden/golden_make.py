"""How the files of this directory were made: ``store.tar.xz``, ``host.tar.xz`` and ``contents.json``.

They are of format 2, the first that stays readable.

    python tests/golden/golden_make.py DIRECTORY

It is kept to show how. **The files are never made again**: a version that cannot open them is wrong. For
something that they do not have, make others beside them, under another name.

``contents.json`` says what each source and each export reads as: its size, and what was written in order as
``[offset, length, seed]``, the bytes being :func:`pattern`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from hashlib import blake2b
from pathlib import Path

HERE = Path(__file__).parent
if __name__ == "__main__":
    for place in ("", "forks", "mutations"):
        sys.path.insert(0, str(HERE.parent / place))

from fork_rig import MIB, PREFIX, Node  # noqa: E402
from mutation_world import start_node  # noqa: E402

from glidefs.errors import StoreUnavailable  # noqa: E402
from glidefs.exports.requests import PromoteRequest, SnapshotRequest, TagRequest  # noqa: E402
from glidefs.formats.hot_set import make_hot_set  # noqa: E402
from glidefs.gc.run import collect  # noqa: E402
from glidefs.store.base import Body  # noqa: E402
from glidefs.store.file import FileStore  # noqa: E402

GIB = 1 << 30
SIZE = 8 * MIB
WIDE = 300 * GIB
SECTOR = 4096
PARTS = ("store", "host")

Writes = list[tuple[int, int, int]]
Contents = dict[str, dict[str, tuple[int, Writes]]]
"""Of "store" by source and of "host" by export: size, and what was written."""


def pattern(seed: int, length: int) -> bytes:
    """Each sector differs from every other one, and compresses well."""
    parts = (blake2b(f"{seed} {i}".encode()).digest() * (SECTOR // 64) for i in range(-(-length // SECTOR)))
    return b"".join(parts)[:length]


class _Store(FileStore):
    """It can go away."""

    away = False

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        if self.away:
            raise StoreUnavailable("away", key=key, op="put")
        return super().put(key, data, if_match=if_match, if_none_match=if_none_match)


class _Maker:
    def __init__(self, directory: Path) -> None:
        self.store = _Store(directory / "store", create=True)
        self.node: Node = start_node(directory / "host", self.store, cache_bytes=4 * MIB)
        self.written: dict[str, tuple[int, Writes]] = {}
        self.contents: Contents = {"store": {}, "host": {}}
        self.seed = 0

    def create(self, name: str, size: int, source: str = "") -> None:
        self.node.create(name, None if source else size, source=source or None, wait=True)
        size, writes = self.contents["store"][source] if source else (size, [])
        self.written[name] = (size, list(writes))

    def write(self, name: str, at: int, length: int) -> None:
        self.seed += 1
        self.node.core(name).pwrite(at, pattern(self.seed, length))
        self.node.core(name).flush()
        self.written[name][1].append((at, length, self.seed))

    def copied(self, source: str, of: str) -> None:
        size, writes = self.written[of]
        self.contents["store"][source] = (size, list(writes))

    def drain(self, *names: str) -> None:
        for name in names:
            self.node.router.drain(name, 60)
            self.copied(name, name)


def make(directory: Path) -> Contents:
    """A store and a host's directory, below ``directory``."""
    maker = _Maker(directory)
    node, forks = maker.node, maker.node.router.forks
    maker.create("origin", SIZE)
    maker.write("origin", 0, MIB)
    maker.drain("origin")
    forks.make_base("origin", PromoteRequest(base="image"))
    maker.copied("base:image", "origin")
    of = node.bases.get(PREFIX, "image").manifest_hash
    node.bases.store_hot_set(PREFIX, "image", make_hot_set(of, (3, 4, 0, 7)))
    maker.create("plain", SIZE)
    maker.create("wide", WIDE)
    maker.create("fork", SIZE, "base:image")
    for name, far in (("plain", 4 * MIB), ("wide", 200 * GIB), ("fork", 4 * MIB)):
        maker.write(name, 0, 300 * 1024)
        maker.write(name, far, 200 * 1024)
    maker.drain("plain", "wide", "fork")
    made = forks.snapshot("plain", SnapshotRequest(tag="release"))
    maker.copied(made["source"].removeprefix("snapshot:"), "plain")
    maker.copied("tag:release", "plain")
    forks.tag("fork", TagRequest(tag="of-fork"))
    maker.copied("tag:of-fork", "fork")
    maker.write("plain", 100 * 1024, 64 * 1024)
    maker.write("wide", 200 * GIB + 64 * 1024, 128 * 1024)
    node.core("plain").zero(0, 64 * 1024)
    maker.written["plain"][1].append((0, 64 * 1024, 0))
    maker.drain("plain", "wide")
    collect(maker.store, PREFIX, grace=86400.0)
    for name, _ in maker.written.items():
        node.core(name).pread(0, MIB)
    maker.store.away = True
    node.fork("unsent", "base:image")
    maker.written["unsent"] = (SIZE, list(maker.contents["store"]["base:image"][1]))
    for name in ("plain", "wide", "fork", "unsent"):
        for at in (4096, 512 * 1024, 2 * MIB):
            maker.write(name, at, 80 * 1024)
    maker.contents["host"] = maker.written
    node.engine.cache.sync()
    node.close()
    return maker.contents


def expected(size: int, writes: Writes, at: int, length: int) -> bytes:
    """What a place reads as; seed 0 is zeros."""
    data = bytearray(length)
    for start, count, seed in writes:
        first, last = max(start, at), min(start + count, at + length)
        if first < last:
            piece = pattern(seed, count) if seed else bytes(count)
            data[first - at : last - at] = piece[first - start : last - start]
    return bytes(data[: max(0, size - at)])


def main(target: Path) -> None:
    """Make the files in ``target``, which has none."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        contents = make(directory)
        for part in PARTS:
            archive = target / f"{part}.tar.xz"
            command = ["tar", "--sparse", "--sort=name", "--owner=0", "--group=0", "-cJf", archive, part]
            assert not archive.exists(), f"{archive} is there: these files are never made again"
            subprocess.run(command, cwd=directory, check=True)
        (target / "contents.json").write_text(json.dumps(contents) + "\n", encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
