"""One fault in the local files of an export: right data, or an error that names it. Never older data."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from fork_rig import BLOCK, MIB, CountingStore, Node

from glidefs.errors import NotServed
from glidefs.exports.requests import AttachRequest
from glidefs.formats.manifest import decode_root
from glidefs.names import manifest_key

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutate import bit_flip, copy_over, fifo, remove, sectors, swap, truncate, zero_fill, zero_sector
from stored_roots import put_root

OLD, SENT, UNSENT = b"o" * BLOCK, b"s" * BLOCK, b"u" * 8192
ATTACH = AttachRequest(transport="nbd")


class Host(NamedTuple):
    """A host that ended with unsent writes, what its volume ``a`` reads, and the ids of ``a`` and ``b``."""

    home: Path
    store: CountingStore
    want: bytes
    ids: tuple[str, str]


def started(home: Path, store: CountingStore) -> Node:
    node = Node(home, store)
    node.router.start()
    assert node.router.wait_tried(20)
    return node


@pytest.fixture
def host(tmp_path: Path, memory: CountingStore) -> Host:
    node = started(tmp_path / "home", memory)
    for name in ("a", "b"):
        node.create(name, 256 * MIB, wait=True)
        node.core(name).pwrite(0, OLD)
        node.router.drain(name)
    older = tmp_path / "older"
    shutil.copytree(node.home, older)
    for name in ("a", "b"):
        node.core(name).pwrite(0, SENT)
        node.core(name).pwrite(140 * MIB, SENT)
        node.router.drain(name)
        node.fork(f"cached-{name}", f"volume:{name}")
        assert node.core(f"cached-{name}").pread(0, BLOCK) == SENT
    memory.set_down(True)  # a drain that ended may still upload what is written after it
    for name in ("a", "b"):
        node.core(name).pwrite(4096, UNSENT)
        node.core(name).flush()
    want = node.core("a").pread(0, BLOCK)
    assert want == SENT[:4096] + UNSENT + SENT[12288:]
    ids = [node.router.show(name).volume_id for name in ("a", "b")]
    node.close()
    memory.set_down(False)
    return Host(node.home, memory, want, (ids[0], ids[1]))


def copied(host: Host, tmp: Path) -> Path:
    home = tmp / "struck" / "home"  # of the same name, which is the node's
    shutil.rmtree(home.parent, ignore_errors=True)
    shutil.copytree(host.home, home)
    return home


def outcome(host: Host, home: Path) -> str:
    """ "right", "after attach" (what was said before names the cure), or the error that stays."""
    node = started(home, host.store)
    try:
        entry = node.router.table.find("a")
        assert entry is not None, "the export is gone"
        said = "right"
        if not entry.serves():
            said = entry.reason
            listed = {one["was"]: one["state"] for one in node.router.logs.list()}
            assert "its record" not in said or listed.get("a") == "record lost"
            try:
                node.router.attach("a", ATTACH)
            except NotServed:
                return said
            assert "glidefs attach a" in said, said
            said = f"after attach: {said}"
        assert node.core("a").pread(0, BLOCK) == host.want, "older data"
        assert node.core("a").pread(140 * MIB, BLOCK) == SENT
        cached = node.router.table.find("cached-a")
        if cached is not None and cached.serves():  # else its own record or log is lost
            assert node.core("cached-a").pread(0, BLOCK) == SENT
        node.router.drain("a")
        return said
    finally:
        node.close()


Fault = tuple[str, Callable[[Path], object]]


def faults(mine: str, other: str, *, bits: int = 4) -> Iterator[Fault]:
    """One fault each in the first file that ``mine``, a pattern below the home, finds."""

    def at(home: Path) -> Path:
        return sorted(home.glob(mine))[0]

    def second(home: Path) -> Path:
        return sorted(home.glob(other))[-1]

    for i in range(bits):
        yield (
            f"bit in part {i} of {bits}",
            lambda h, i=i: bit_flip(at(h), at(h).stat().st_size * i // bits),
        )
    yield "first sector", lambda h: zero_sector(at(h), 0)
    yield "last sector", lambda h: zero_sector(at(h), sectors(at(h))[-1])
    for quarter in range(0, 4, 2):
        yield f"cut at {quarter}/4", lambda h, q=quarter: truncate(at(h), at(h).stat().st_size * q // 4)
    yield "zeros", lambda h: zero_fill(at(h))
    yield "a terabyte long", lambda h: truncate(at(h), 1 << 40)
    yield "a FIFO", lambda h: fifo(at(h))
    yield "gone", lambda h: remove(at(h))
    yield "swapped", lambda h: at(h) != second(h) and swap(at(h), second(h))
    yield "that of another", lambda h: copy_over(second(h), at(h))
    yield "older", lambda h: copy_over(at(h.parents[1] / "older"), at(h))


def strike(host: Host, path: str, tmp: Path, **options: int) -> dict[str, str]:
    """What comes of each fault; ``{}`` in ``path`` is the volume's id, ``{name}`` its name."""
    found: dict[str, str] = {}
    objects = dict(host.store._objects)
    mine, other = (path.format(id, name=name) for id, name in zip(host.ids, "ab", strict=True))
    for what, fault in faults(mine, other, **options):
        home = copied(host, tmp)
        with contextlib.suppress(shutil.SameFileError):  # there is only one such file
            fault(home)
        found[what] = outcome(host, home)
        host.store._objects = dict(objects)
    return found


@pytest.mark.parametrize(
    "path", ["state/volumes/{}/root", "state/indices/*", "logs/{}/*.witness", "blocks/blocks.index"]
)
def test_what_the_store_or_others_have_is_made_again(host: Host, tmp_path: Path, path: str) -> None:
    """A local root, a pack index, a witness and the index of the cache: nobody notices but the log."""
    found = strike(host, path, tmp_path)
    assert set(found.values()) == {"right"}, found


def test_a_record(host: Host, tmp_path: Path) -> None:
    """It is listed with the verb that makes it again, log and all; what it was does not get lost."""
    for what, outcome in strike(host, "exports/{name}.json", tmp_path).items():
        if what == "older":
            assert outcome == "right", outcome
        else:
            assert outcome.startswith("after attach: its record is "), f"{what}: {outcome}"


@pytest.mark.parametrize("damage", ["journal", "gone", "cut off"])
def test_a_log_that_lost_what_was_flushed(host: Host, tmp_path: Path, damage: str) -> None:
    """An error that names the file, from `attach` too; `--take-over` then serves what the store has."""
    home = copied(host, tmp_path)
    segments = (home / "logs" / host.ids[0]).glob("*/*.seg")
    (segment,) = [path for path in segments if UNSENT in path.read_bytes()]
    match damage:
        case "journal":
            zero_sector(segment, 2)
        case "gone":
            remove(segment)
        case _:
            truncate(segment, 8192)
    node = started(home, host.store)
    try:
        said = node.router.show("a")
        assert said.state == "failed"
        assert segment.stem in said.reason
        assert "take-over" in said.reason
        with pytest.raises(NotServed, match=segment.stem):
            node.router.attach("a", ATTACH)
        assert node.router.attach("a", AttachRequest(transport="nbd", take_over=True)).state == "serving"
        assert node.core("a").pread(0, BLOCK) == SENT
    finally:
        node.close()


def test_the_directory_of_a_log_that_was_not_begun_goes(host: Host, tmp_path: Path) -> None:
    """A crash between it and the record of a new export leaves it; one that has or had anything stays."""
    home = copied(host, tmp_path)
    unused, used, had = (home / "logs" / (letter * 32) / ("0" * 32) for letter in "abc")
    for directory in (unused, used, had):
        directory.mkdir(parents=True)
    (used / "0000000000000001.seg").write_bytes(bytes(8192))
    had.with_name(f"{had.name}.witness").write_bytes(bytes(8192))
    node = started(home, host.store)
    try:
        assert [path.exists() for path in (unused, unused.parent, used, had)] == [False, False, True, True]
        assert node.core("a").pread(0, BLOCK) == host.want
    finally:
        node.close()


def test_a_record_and_its_log_that_was_sent(host: Host, tmp_path: Path) -> None:
    """Nothing unsent: `attach` takes the volume as from any other host."""
    node = started(copied(host, tmp_path), host.store)
    node.router.drain("a")
    node.close()
    remove(node.home / "exports" / "a.json")
    node = started(node.home, host.store)
    try:
        assert node.router.table.find("a") is None
        assert node.router.attach("a", ATTACH).state == "serving"
        assert node.core("a").pread(0, BLOCK) == host.want
    finally:
        node.close()


def test_a_record_of_a_fork_that_the_store_does_not_know(
    tmp_path: Path, memory: CountingStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Its log alone is left: a start names it, with the verb that saves what it holds."""
    node = started(tmp_path / "home", memory)
    node.base("deb", OLD, 16 * MIB)
    node.fork("f0", "base:deb", wait=True)  # the base is known here from now on
    memory.set_down(True)
    node.fork("f", "base:deb")
    node.core("f").pwrite(4096, UNSENT)
    node.core("f").flush()
    volume = node.router.show("f").volume_id
    node.close()
    remove(node.home / "exports" / "f.json")
    memory.set_down(False)
    caplog.clear()
    node = started(node.home, memory)
    try:
        (lost,) = [log for log in node.router.logs.list() if log["volume_id"] == volume]
        assert (lost["state"], lost["was"]) == ("record lost", None)
        said = [line for line in caplog.messages if "whose record is lost" in line]
        assert len(said) == 1, "of one log"
        assert f"'glidefs logs export {volume} {lost['log_id']} FILE'" in said[0]
        image = node.home / "image"
        assert node.router.logs.export(volume, lost["log_id"], str(image))["bytes"] == len(UNSENT)
        assert image.read_bytes()[4096:12288] == UNSENT
        node.router.logs.delete(volume, lost["log_id"], force=True)
    finally:
        node.close()


def test_a_directory_that_is_lost(host: Host, tmp_path: Path) -> None:
    """A log is there before its record: one that is missing was lost, not never begun."""
    objects = dict(host.store._objects)
    lost = [path.relative_to(host.home) for path in host.home.rglob("*") if path.is_dir()]
    log_id = next(host.home.glob(f"logs/{host.ids[0]}/*.witness")).stem
    for path in lost:
        home = copied(host, tmp_path)
        shutil.rmtree(home / path)
        said = outcome(host, home)
        host.store._objects = dict(objects)
        if path.parts[0] == "logs" and (len(path.parts) == 1 or path.parts[1] == host.ids[0]):
            assert "its write log is not here" in said or log_id in said
            assert "glidefs attach a --take-over" in said or "attach NAME --take-over" in said
        elif path.parts[0] == "exports":
            assert said.startswith("after attach: its record is lost")
        else:
            assert said == "right", path


def test_a_log_that_is_lost_is_given_up_by_a_verb(host: Host, tmp_path: Path) -> None:
    home = copied(host, tmp_path)
    shutil.rmtree(home / "logs" / host.ids[0])
    for _ in range(2):
        node = started(home, host.store)
        node.router.attach("a", AttachRequest(transport="nbd", take_over=True))
        assert node.core("a").pread(0, BLOCK) == SENT, "what the store has"
        node.close()
    node = started(home, host.store)
    assert node.core("a").pread(0, BLOCK) == SENT, "the log was begun, though nothing was written since"
    node.close()


@pytest.mark.parametrize("step", [1, -1], ids=["a copy's", "an older one"])
def test_a_lost_local_root_is_not_replaced_by_a_root_of_somebody_else(
    host: Host, tmp_path: Path, step: int
) -> None:
    """It has the ids of this log, but nobody put it from here."""
    home = copied(host, tmp_path)
    key = manifest_key("default", "a")
    found = host.store.get(key)
    root = decode_root(key, found.data)
    other = msgspec.structs.replace(root, nonce=bytes(16), sequence=root.sequence + step)
    put_root(host.store, key, other, if_match=found.etag)
    zero_sector(next(home.glob(f"state/volumes/{host.ids[0]}/root")), 0)
    assert "was not put from here" in outcome(host, home)
