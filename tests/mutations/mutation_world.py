"""A store and a host with something of every kind in them, kept aside, and what each of it must read as.

Made once. Each case copies it, damages one thing and starts again, so a case costs what it copies. Volumes
``v`` and ``w`` are alike, so that what is of one can lie where that of the other belongs; so are ``wide`` and
``wider`` (with page objects), the forks ``f`` and ``g``, and the bases. The store is away at the end: all but
``wider`` and ``g`` have flushed data that only the log has, the fork ``h`` has nothing there, and the last
commit of ``g`` was taken by the store without an answer.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from fork_rig import MIB, PREFIX, Node
from waiting import wait_for

from glidefs.daemon.identity import CacheIdentity
from glidefs.errors import StoreUnavailable
from glidefs.exports.requests import SnapshotRequest, TagRequest
from glidefs.formats import identity
from glidefs.formats.hot_set import make_hot_set
from glidefs.formats.identity import StoreIdentity
from glidefs.gc.run import collect
from glidefs.manifest.lease import Owner
from glidefs.names import manifest_key
from glidefs.store.base import ObjectInfo
from glidefs.store.memory import MemoryStore
from glidefs.store.which import WhichStore
from glidefs.volume.volume import DrainTimeout

GIB = 1 << 30
SIZE = 64 * MIB
WIDE = 260 * GIB
DAY = 86400.0
KIB = 1024
SECTOR = 4096

Objects = dict[str, tuple[bytes, ObjectInfo]]

NODE: dict[str, Any] = {"segment_bytes": MIB, "cache_bytes": 16 * MIB}
"""Settings of every node: little of everything, so that it is copied fast."""


class Image:
    """What a volume reads as in the places that tests look at; a missing write is zeros."""

    def __init__(self, size: int, places: dict[int, bytearray] | None = None) -> None:
        self.size = size
        self.sectors: set[bytes] = {bytes(SECTOR)}
        """Every sector that was ever written."""
        far = 200 * GIB if size > 200 * GIB else 40 * MIB
        self.places = places or {
            0: bytearray(768 * KIB),
            far: bytearray(256 * KIB),
            size // 2: bytearray(128 * KIB),
        }

    def copy(self) -> Image:
        """As it is now."""
        image = Image(self.size, {at: bytearray(data) for at, data in self.places.items()})
        image.sectors = set(self.sectors)
        return image

    def write(self, at: int, data: bytes) -> None:
        """What a guest writes; in one place."""
        start = max(place for place in self.places if place <= at)
        assert at + len(data) <= start + len(self.places[start])
        self.places[start][at - start : at - start + len(data)] = data
        self.sectors |= {data[i : i + SECTOR] for i in range(0, len(data), SECTOR)}

    @property
    def far(self) -> int:
        """The second place."""
        return list(self.places)[1]


class World(NamedTuple):
    """``home`` and ``older``: the host's directory at the end and before; ``foreign`` that of another host.

    ``foreign_store`` is what another store says of itself.

    ``images`` is what this host must serve, ``stored`` what the store has by source, ``before`` what it had.
    """

    home: Path
    older: tuple[Path, ...]
    foreign: Path
    foreign_store: bytes
    objects: Objects
    older_objects: Objects
    images: dict[str, Image]
    stored: dict[str, Image]
    before: dict[str, Image]
    volumes: dict[str, str]
    """Names by id, in hex."""


def copy_tree(source: Path, target: Path) -> None:
    """Holes stay holes."""
    subprocess.run(["cp", "-a", "--sparse=always", str(source), str(target)], check=True)


def identify(home: Path) -> CacheIdentity:
    """Who the host with this directory is, as a start of the daemon finds out."""
    for directory in (home, home / "logs", home / "blocks", home / "exports"):
        directory.mkdir(parents=True, exist_ok=True)
    recorded = any((home / "exports").glob("*.json"))
    return CacheIdentity(
        home, {"log_dir": home / "logs", "block_cache_dir": home / "blocks"}, keeps_logs=recorded
    )


def start_node(home: Path, memory: MemoryStore, **settings: Any) -> Node:
    """A host as the daemon makes it, without its listeners. Raises ConfigError."""
    own = identify(home)
    node = Node(
        home,
        memory,
        owner=Owner(own.host_id, "a"),
        logs_missing=own.foreign.get("log_dir", ""),
        **{**NODE, **settings},
    )
    node.store.identity = WhichStore(own.store_id, own.bind)
    return node


class _Maker:
    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.random = random.Random(12)
        self.memory = MemoryStore()
        self.home = tmp / "home"
        self.images: dict[str, Image] = {}
        self.stored: dict[str, Image] = {}
        self.node = start_node(self.home, self.memory, store_patience=5.0)

    def write(self, name: str, at: int, length: int) -> None:
        """As a guest does that flushes."""
        data = self.random.randbytes(length)
        core = self.node.core(name)
        core.pwrite(at, data)
        core.flush()
        self.images[name].write(at, data)

    def drain(self, *names: str) -> None:
        for name in names:
            self.node.router.drain(name, 60)
            self.stored[name] = self.images[name].copy()

    def base(self, name: str) -> None:
        self.images[f"base:{name}"] = Image(SIZE)
        data = self.random.randbytes(512 * KIB)
        self.node.base(name, data, SIZE)
        self.images[f"base:{name}"].write(0, data)
        self.stored[f"base:{name}"] = self.images[f"base:{name}"]

    def hot_sets(self, *blocks: int) -> None:
        for name in ("deb", "ubu"):
            of = self.node.bases.get(PREFIX, name).manifest_hash
            self.node.bases.store_hot_set(PREFIX, name, make_hot_set(of, blocks))

    def keep(self) -> None:
        """A snapshot and a tag of ``v`` and ``w``."""
        for name, tag in (("v", "t"), ("w", "u")):
            made = self.node.router.forks.snapshot(name, SnapshotRequest())
            self.node.router.forks.tag(name, TagRequest(tag=tag))
            self.stored[f"{name}@{made['sequence']}"] = self.stored[f"tag:{tag}"] = self.images[name].copy()

    def aside(self, name: str) -> Path:
        copy_tree(self.home, self.tmp / name)
        return self.tmp / name


def make_world(tmp: Path) -> World:
    """Make it all, in three steps; the objects and files of the first two are the older ones."""
    maker = _Maker(tmp)
    node, memory = maker.node, maker.memory
    (maker.home / "store-probed").write_text("memory:// \n")
    foreign = tmp / "foreign"
    identify(foreign)
    maker.base("deb")
    maker.base("ubu")
    maker.hot_sets(0, 1)
    names = ("v", "w", "wide", "wider", "f", "g")
    for name in names:
        size = WIDE if name.startswith("wide") else SIZE
        maker.images[name] = Image(size)
        if name in "fg":
            of = "deb" if name == "f" else "ubu"
            node.fork(name, f"base:{of}", wait=True)
            maker.images[name] = maker.stored[f"base:{of}"].copy()
        else:
            node.create(name, size, wait=True)
        maker.write(name, 0, 256 * KIB)
        maker.write(name, maker.images[name].far, 64 * KIB)
    maker.drain(*names)
    maker.keep()
    collect(memory, PREFIX, grace=DAY)
    older_objects, before = dict(memory._objects), dict(maker.stored)
    first = maker.aside("first")
    node.router.resize("w", SIZE + 16 * MIB)  # its record changes too
    for name in names:
        maker.write(name, 128 * KIB, 192 * KIB)
        maker.write(name, maker.images[name].far + 32 * KIB, 48 * KIB)
    maker.drain(*names)
    maker.keep()
    maker.hot_sets(2, 0, 1)
    collect(memory, PREFIX, grace=DAY)
    for name, image in maker.images.items():
        if name in names:  # what was read is resident
            assert all(node.core(name).pread(at, len(data)) == data for at, data in image.places.items())
    volume = node.router.table.get("w").volume
    assert volume is not None
    volume.retire_committed()
    _lose_an_answer(maker)
    for name in ("v", "w", "wide", "f"):
        maker.write(name, 300 * KIB, 200 * KIB)
    node.fork("h", "base:deb")  # the store does not know it yet
    maker.images["h"] = maker.stored["base:deb"].copy()
    maker.write("h", 0, 64 * KIB)
    second = maker.aside("second")
    for name in ("v", "w", "wide", "f"):
        for _ in range(3):
            maker.write(name, 64 * KIB, 400 * KIB)
        maker.write(name, 500 * KIB, 40 * KIB)
    node.engine.cache.sync()
    volumes = {entry.volume.id.hex(): entry.name for entry in node.router.table.all() if entry.volume}
    node.close()
    return World(
        home=maker.home,
        older=(second, first),
        foreign=foreign,
        foreign_store=identity.encode(StoreIdentity(id=identity.new_id(), created=1)),
        objects=dict(memory._objects),
        older_objects=older_objects,
        images={name: image for name, image in maker.images.items() if ":" not in name},
        stored=maker.stored,
        before=before,
        volumes=volumes,
    )


def _lose_an_answer(maker: _Maker) -> None:
    """The store takes the next commit of ``g``, and is away from then on."""
    memory = maker.memory
    put = memory.put

    def last(key: str, data: Any, **conditions: Any) -> str:
        etag = put(key, data, **conditions)
        if key == manifest_key(PREFIX, "g"):
            memory.set_down(True)
            raise StoreUnavailable("the answer was lost", key=key, op="put")
        return etag

    memory.put = last  # type: ignore[method-assign]
    maker.write("g", 300 * KIB, 64 * KIB)
    with contextlib.suppress(DrainTimeout):
        maker.node.router.drain("g", 1)
    wait_for(lambda: memory._down, "the commit")
    maker.stored["g"] = maker.images["g"].copy()


def restored(objects: Objects) -> MemoryStore:
    """A store with these objects."""
    memory = MemoryStore()
    memory._objects = dict(objects)
    memory._generation = 1 << 20
    return memory


def put_bytes(memory: MemoryStore, key: str, data: bytes, *, same_etag: bool) -> None:
    """Replace an object behind everybody's back: a rotten disk keeps the ETag, a copy does not."""
    old = memory._objects.get(key)
    memory._generation += 1
    etag = old[1].etag if old and same_etag else f'"{memory._generation:x}"'
    memory._objects[key] = (data, ObjectInfo(key, len(data), etag, time.time()))


def forget(path: Path) -> None:
    """Delete a case's directory."""
    shutil.rmtree(path, ignore_errors=True)
