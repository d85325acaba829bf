"""Which damage to what: kinds of objects and files, mutations, and the starts after them; all by seed."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import mutate
from mutation_world import World, put_bytes

from glidefs.store.memory import MemoryStore
from glidefs.store.which import STORE_KEY

SECTOR = mutate.SECTOR
OBJECTS: dict[str, Callable[[str], bool]] = {
    "volume root": lambda key: "/volumes/" in key and key.endswith("/manifest") and "-origin" not in key,
    "page": lambda key: "/pages/" in key,
    "pack": lambda key: "/packs/" in key,
    "snapshot": lambda key: "/snapshots/" in key,
    "tag": lambda key: "/tags/" in key,
    "base manifest": lambda key: "/bases/" in key and key.endswith("/manifest"),
    "hot set": lambda key: key.endswith("/hot-set"),
    "gc state": lambda key: key.endswith("gc/state"),
    "store id": lambda key: key == STORE_KEY,
}
FILES = {
    "segment header": "logs/*/*/*.seg",
    "segment journal": "logs/*/*/*.seg",
    "segment data": "logs/*/*/*.seg",
    "witness": "logs/*/*.witness",
    "local root": "state/volumes/*/root",
    "local page": "state/volumes/*/pages/*",
    "tried": "state/volumes/*/tried",
    "export record": "exports/*.json",
    "host id": "host.json",
    "mark": "*/.glidefs",
    "cache index": "blocks/blocks.index",
    "cache data": "blocks/blocks.data",
    "index file": "state/indices/*",
    "store probed": "store-probed",
}
REGIONS = ("segment header", "segment journal", "segment data")
MUTATIONS = ("bit flip", "truncation", "zero fill", "zeroed sector", "swap", "older", "copy", "absence")
WARM, READ_THROUGH, COLD, OFFLINE = "warm", "warm without block cache", "cold", "offline"
ONLY_ONE = ("gc state",)
"""Kinds of which a store has one: nothing to swap it with."""
NEVER_OLDER = (
    "store id",
    "page",
    "local page",
    "pack",
    "snapshot",
    "base manifest",
    "host id",
    "mark",
    "index file",
    "store probed",
)
"""Kinds that are written once."""


class Case(NamedTuple):
    """One of them. ``number`` with the seed of the run is all that it depends on."""

    seed: int
    number: int
    kind: str
    mutation: str
    start: str

    def __str__(self) -> str:
        return f"seed {self.seed} case {self.number}: {self.mutation} of a {self.kind}, {self.start} start"

    def random(self) -> random.Random:
        """The choices of this case."""
        return random.Random(f"{self.seed} {self.number}")


def _combinations() -> list[tuple[str, str, str]]:
    found = []
    for kind in (*OBJECTS, *FILES):
        for mutation in MUTATIONS:
            if mutation in ("swap", "copy") and kind in ONLY_ONE:
                continue
            if mutation == "older" and kind in NEVER_OLDER:
                continue
            if mutation == "copy" and kind == "store id":
                continue  # the same as a swap with that of another store
            if mutation in ("truncation", "absence") and kind in REGIONS[1:]:
                continue  # one of the file, as of its header
            if kind in OBJECTS:
                starts: tuple[str, ...] = (WARM, READ_THROUGH, COLD, OFFLINE)
            elif kind in (*REGIONS, "witness"):
                starts = (WARM, READ_THROUGH, OFFLINE)
            elif kind.startswith("cache"):
                starts = (WARM,)
            else:
                starts = (WARM, READ_THROUGH)
            found += [(kind, mutation, start) for start in starts]
    return found


def cases(seed: int, count: int) -> Iterator[Case]:
    """The first ``count`` cases of a seed: all combinations in some order, again and again."""
    combinations = _combinations()
    shuffled: list[tuple[str, str, str]] = []
    for number in range(count):
        if not shuffled:
            shuffled = list(combinations)
            random.Random(f"{seed} {number}").shuffle(shuffled)
        yield Case(seed, number, *shuffled.pop())


class Struck(NamedTuple):
    """What was damaged: key or path, what may name it in an error, and the export that it is of, if one."""

    target: str
    names: tuple[str, ...]
    export: str


def strike_store(world: World, case: Case, memory: MemoryStore, tmp: Path) -> Struck:
    """Damage one object."""
    rng = case.random()
    keys = sorted(key for key in world.objects if OBJECTS[case.kind](key))
    if case.mutation == "older":
        keys = [
            key
            for key in keys
            if world.older_objects.get(key, world.objects[key])[0] != world.objects[key][0]
        ]
    key = rng.choice(keys)
    other = rng.choice([one for one in keys if one != key] or [key])
    data, there = world.objects[key][0], world.objects[other][0]
    if case.kind == "store id" and case.mutation == "swap":
        put_bytes(memory, key, world.foreign_store, same_etag=False)
    elif case.mutation == "swap":
        put_bytes(memory, key, there, same_etag=False)
        put_bytes(memory, other, data, same_etag=False)
    elif case.mutation == "copy":
        put_bytes(memory, key, there, same_etag=False)
    elif case.mutation == "older":
        put_bytes(memory, key, world.older_objects[key][0], same_etag=False)
    elif case.mutation == "absence":
        del memory._objects[key]
    else:
        path = tmp / "object"
        path.write_bytes(data)
        _damage(path, case.mutation, rng, 0, len(data))
        put_bytes(memory, key, path.read_bytes(), same_etag=rng.random() < 0.5)
    names = [key, other, _called(other)] if case.mutation == "swap" else [key]
    names.append(_called(key))
    if case.kind == "store id":
        names.append("not this host's store")
    if case.kind == "volume root" and case.mutation == "absence":
        names.append("its manifest is gone from the store")
    export = key.split("/")[2] if "/volumes/" in key else ""
    return Struck(key, tuple(names), export)


def _called(key: str) -> str:
    """What a user calls the object, where it has such a name, with the words that say so."""
    parts = key.split("/")
    if len(parts) == 1:
        return key
    if "/snapshots/" in key:
        return f"snapshot:{parts[2]}@{int(parts[-1])}: "
    if "/tags/" in key:
        return f"tag:{parts[2]}: "
    kind = {"volumes": "volume", "bases": "base"}.get(parts[1])
    return f"{parts[2]}: no {kind} of that name" if kind else key


def strike_files(world: World, case: Case, home: Path) -> Struck:
    """Damage one file of the host."""
    rng = case.random()
    paths = sorted(path for path in home.glob(FILES[case.kind]) if path.is_file())
    if case.mutation == "older":
        paths = [path for path in paths if _older(world, home, path)]
    path = rng.choice(paths)
    other = _other(world, case, home, path, paths, rng)
    start, end = _region(path, case.kind)
    if case.mutation == "older":
        _transplant(_older(world, home, path)[0], path, case.kind)
    elif case.mutation == "copy":
        _transplant(other, path, case.kind)
    elif case.mutation == "swap":
        kept = path.with_name(f"{path.name}.kept")
        mutate.copy_over(path, kept)
        _transplant(other, path, case.kind)
        if other.is_relative_to(home):
            _transplant(kept, other, case.kind)
        kept.unlink()
    elif case.mutation == "absence":
        mutate.remove(path)
    else:
        _damage(path, case.mutation, rng, start, end)
    return Struck(str(path.relative_to(home)), _names(world, case, home, path, other), _export(world, path))


def _damage(path: Path, mutation: str, rng: random.Random, start: int, end: int) -> None:
    """A bit, an end, a sector or all of the bytes from ``start`` to ``end``; where there is data, mostly."""
    data = path.read_bytes()
    full = [at for at in range(start, end, SECTOR) if data[at : at + SECTOR].strip(b"\0")]
    at = rng.choice(full) if full and rng.random() < 0.9 else rng.randrange(start, end)
    within = min(SECTOR, end - at)
    if mutation == "bit flip":
        mutate.bit_flip(path, at + rng.randrange(within), rng.randrange(8))
    elif mutation == "truncation":
        mutate.truncate(path, at if rng.random() < 0.5 else at + rng.randrange(within))
    elif mutation == "zero fill":
        mutate.zero_fill(path, start, end - start)
    else:
        mutate.zero_sector(path, at // SECTOR)


def _region(path: Path, kind: str) -> tuple[int, int]:
    """Where in the file that kind is."""
    size = path.stat().st_size
    if kind not in REGIONS:
        return 0, size
    journal = 2 * SECTOR
    with path.open("rb") as file:
        file.seek(12)
        sectors = struct.unpack("<I", file.read(4))[0]
    data = journal + -(-sectors * 32 // SECTOR) * SECTOR
    return {REGIONS[0]: (0, journal), REGIONS[1]: (journal, data), REGIONS[2]: (data, size)}[kind]


def _transplant(source: Path, target: Path, kind: str) -> None:
    """The whole file for the header of a segment and all but segments; the region for the others."""
    if kind not in REGIONS[1:]:
        mutate.copy_over(source, target)
        return
    start, end = _region(target, kind)
    with source.open("rb") as file:
        file.seek(start)
        data = file.read(end - start)
    with target.open("r+b") as file:
        file.seek(start)
        file.write(data)


def _older(world: World, home: Path, path: Path) -> list[Path]:
    found = [directory / path.relative_to(home) for directory in world.older]
    return [old for old in found if old.is_file() and old.read_bytes() != path.read_bytes()]


def _other(world: World, case: Case, home: Path, path: Path, paths: list[Path], rng: random.Random) -> Path:
    """Another valid one of the kind."""
    if case.kind in ("host id", "mark"):
        return world.foreign / path.relative_to(home)
    if case.kind.startswith("cache") or case.kind == "store probed":
        return world.older[-1] / path.relative_to(home)
    return rng.choice([one for one in paths if one != path] or [path])


def _export(world: World, path: Path) -> str:
    if path.suffix == ".json" and path.parent.name == "exports":
        return path.stem
    return next((world.volumes[part] for part in path.parts if part in world.volumes), "")


def _names(world: World, case: Case, home: Path, path: Path, other: Path) -> tuple[str, ...]:
    """What an error may call it: its path; of a log its directory; of who the host is the directories."""
    files = [path, *([other] if case.mutation == "swap" else [])]
    names = [str(file) for file in files]
    if case.kind in (*REGIONS, "witness"):
        names += [
            str(file.with_suffix("")) if file.suffix == ".witness" else str(file.parent) for file in files
        ]
    if case.kind == "export record" and case.mutation == "absence":
        names.append(
            f"its record is lost, and its write log holds unsent writes; 'glidefs attach {path.stem}'"
        )
    if case.kind == "tried":  # it is evidence: without it a commit of our own is somebody else's
        names += [f" {_export(world, file)} is FENCED: " for file in files]
    if case.kind in ("host id", "mark"):
        names += [str(home / "logs"), str(home / "blocks")]
    return tuple(names)
