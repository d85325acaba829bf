"""Random histories of a host, its clones and a store that is swapped, unmounted or goes back in time.

A host is cloned with its cache directory while it is clean or dirty; both go on. The store may be replaced by
an empty one, may be away, may show an older root for a while. Whatever comes: the roots in the store are one
line of commits of one host, no volume serves what another host committed, the store is never written by
who is not its own, and when all is well again just one host serves, and everything it acknowledged is there.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_rig import MIB, PREFIX, CountingStore, Node
from stored_roots import owner_of

from glidefs.errors import GlideError
from glidefs.formats.manifest import Root, decode_root
from glidefs.names import manifest_key
from glidefs.store.base import Body, join_body
from glidefs.store.which import WhichStore

KEY = manifest_key(PREFIX, "v")
SECTORS = 16
HISTORIES = {"quick": 10, "normal": 30, "long": 2000}[os.environ.get("GLIDEFS_TEST_LENGTH", "normal")]
FIRST = int(os.environ.get("GLIDEFS_IDENTITY_SEED", "0"))


class Roots(CountingStore):
    """``roots`` are the versions of the volume's root in order, but what is put while it is ``another``."""

    def __init__(self) -> None:
        super().__init__()
        self.roots: list[bytes] = []
        self.another = False

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        etag = super().put(key, data, if_match=if_match, if_none_match=if_none_match)
        if key == KEY and not self.another:
            self.roots.append(join_body(data))
        return etag

    @contextlib.contextmanager
    def changed(self) -> Iterator[None]:
        """What is put and deleted inside is undone."""
        before, self.another = dict(self._objects), True
        try:
            yield
        finally:
            self._objects, self.another = before, False

    def show(self, key: str, data: bytes) -> None:
        """From now on the object is that."""
        super().put(key, data)

    def clear(self) -> None:
        self._objects = {}

    @property
    def keys(self) -> set[str]:
        return set(self._objects)


class Host:
    """A machine and what its guest knows: ``content`` is what it read or wrote last, by sector."""

    def __init__(self, world: World, home: Path, content: dict[int, bytes]) -> None:
        self.world = world
        self.home = home
        self.content = dict(content)
        self.lost = False
        """Whether it was found to be fenced: it must never serve again."""
        self.start()

    def start(self) -> None:
        self.node = Node(self.home, self.world.store, owner=owner_of("v"))
        self.node.store.identity = WhichStore(self.world.id, lambda id_: None)
        self.node.router.start()
        assert self.node.router.wait_tried(20)
        self.look()

    def stop(self) -> None:
        self.node.close()

    @property
    def serves(self) -> bool:
        return self.node.router.table.get("v").serves()

    @property
    def root(self) -> Root | None:
        """The root in use."""
        volume = self.node.router.table.get("v").volume
        return None if volume is None else volume.root

    def look(self) -> None:
        """Whether it is fenced; who was stays it."""
        fenced = self.node.router.table.get("v").is_fenced()
        assert fenced or not self.lost, "a fenced log is served again"
        self.lost = fenced

    def check(self) -> None:
        """What is served is what the guest knows."""
        self.look()
        if self.lost:
            return
        for sector, data in self.content.items():
            with contextlib.suppress(OSError, GlideError):  # absent, and the store does not serve
                assert self.node.core("v").pread(sector * 4096, 4096) == data, (
                    f"sector {sector} of {self.home}"
                )

    def write(self, sector: int, data: bytes) -> None:
        if not self.lost and self.serves:
            try:
                self.node.core("v").pwrite(sector * 4096, data)
            except GlideError:
                return  # EIO: it was fenced a moment ago
            self.content[sector] = data

    def drain(self, patience: float = 5.0) -> bool:
        try:
            self.node.router.drain("v", patience)
        except GlideError:
            return False
        return True


class World:
    """One store that may be another for a while, and the hosts."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place = place
        self.rng = random.Random(seed)
        self.store = Roots()
        self.id: str | None = None
        self.hosts: list[Host] = []
        self.steps: list[str] = []

    def begin(self) -> None:
        home = self.place / "host-0"
        node = Node(home, self.store, owner=owner_of("v"))
        bound: list[str] = []
        node.store.identity = WhichStore(None, bound.append)
        node.create("v", 64 * MIB, wait=True)
        self.id = bound[0]
        node.close()
        self.hosts.append(Host(self, home, {}))

    def pick(self) -> Host:
        return self.rng.choice(self.hosts)

    def step(self) -> None:
        names = ["write"] * 6 + ["drain"] * 3 + ["restart"] * 2 + ["clone", "swap", "back", "away"]
        name = self.rng.choice(names)
        self.steps.append(name)
        getattr(self, name)()
        for host in self.hosts:
            host.check()

    def write(self) -> None:
        self.pick().write(self.rng.randrange(SECTORS), self.rng.randbytes(16) * 256)

    def drain(self) -> None:
        self.pick().drain()

    def restart(self) -> None:
        host = self.pick()
        host.stop()
        host.start()

    def clone(self) -> None:
        """The machine is copied as it is; a copy knows what its guest wrote."""
        if len(self.hosts) < 3:
            original = self.pick()
            if not original.lost:
                original.stop()
                home = self.place / f"host-{len(self.hosts)}"
                shutil.copytree(original.home, home)
                original.start()
                if not original.lost:
                    self.hosts.append(Host(self, home, original.content))

    def some_steps(self) -> None:
        for _ in range(self.rng.randrange(1, 4)):
            host = self.pick()
            if self.rng.random() < 0.3:
                host.stop()
                host.start()
            host.write(self.rng.randrange(SECTORS), self.rng.randbytes(16) * 256)
            host.drain(0.5)

    def swap(self) -> None:
        """Another store in its place: an unmounted disk, a wrong bucket."""
        before = [host.lost for host in self.hosts]
        with self.store.changed():
            self.store.clear()
            for host in self.hosts:
                host.node.store.identity.doubt()  # as after the outage in which it was swapped
            self.some_steps()
            assert not self.store.keys, "something was put into a store that is not this host's"
        for host, lost in zip(self.hosts, before, strict=True):
            host.look()
            assert host.lost == lost, "an absence in another store fenced a volume"

    def back(self) -> None:
        """The store shows an older root for a while; who committed last goes on."""
        older = self.rng.choice(self.store.roots)
        newest = [host for host in self.hosts if host.root == self.newest()]
        if decode_root(KEY, older) == self.newest():
            return
        with self.store.changed():
            self.store.show(KEY, older)
            for host in newest:
                host.write(self.rng.randrange(SECTORS), self.rng.randbytes(16) * 256)
                assert not host.drain(0.5), "it was drained into a store that went back"
                host.look()
                assert not host.lost, "an older root fenced a volume"
            assert self.store.get(KEY).data == older, "a root was put over an older one"

    def newest(self) -> Root:
        return decode_root(KEY, self.store.roots[-1])

    def away(self) -> None:
        self.store.set_down(True)
        try:
            self.some_steps()
        finally:
            self.store.set_down(False)

    def end(self) -> None:
        """All is well again."""
        for host in self.hosts * 2:
            host.drain(20)
        for host in self.hosts:
            host.stop()
            host.start()
        roots = [decode_root(KEY, data) for data in self.store.roots]
        sequences = [root.sequence for root in roots]
        assert sequences == sorted(set(sequences)), "two lines of roots"
        assert len({root.log_id for root in roots}) == 1
        committed = [host for host in self.hosts if host.root == self.newest() and not host.lost]
        assert committed, "who committed last does not serve"
        for host in self.hosts:
            assert host in committed or host.lost, "a volume is served that another host committed"
        for host in committed:
            host.check()
            host.node.engine.cache.evict_all()
            host.check()


@pytest.mark.parametrize("chunk", range(0, HISTORIES, 10))
def test_histories(tmp_path: Path, chunk: int) -> None:
    for seed in range(FIRST + chunk, FIRST + chunk + 10):
        world = World(tmp_path / str(seed), seed)
        try:
            world.begin()
            for _ in range(12):
                world.step()
            world.end()
        except BaseException as error:
            error.add_note(f"GLIDEFS_IDENTITY_SEED={seed}: {' '.join(world.steps)}")
            raise
        finally:
            for host in world.hosts:
                host.stop()
        shutil.rmtree(tmp_path / str(seed), ignore_errors=True)
