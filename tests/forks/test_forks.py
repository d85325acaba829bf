"""Forks of bases, volumes, snapshots and tags: what they cost and that they are their own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fork_rig import BLOCK, MIB, PREFIX, CountingStore, Node, delayed
from waiting import wait_for

from glidefs.bless.bless import bless
from glidefs.errors import (
    ConfigError,
    ExportExists,
    Fenced,
    GlideError,
    NotSupported,
    StoreError,
    UnknownExport,
)
from glidefs.exports.requests import AttachRequest, PromoteRequest, SnapshotRequest, TagRequest
from glidefs.formats.manifest import decode_root
from glidefs.manifest import lease
from glidefs.names import manifest_key, parse_source
from glidefs.offline.export import export_image

MakeNode = Callable[..., Node]
DATA = os.urandom(3 * MIB)


def test_a_fork_of_a_cached_base_makes_no_request(node: Node, memory: CountingStore) -> None:
    node.base("deb", DATA)
    node.fork("first", "base:deb")
    wait_for(lambda: node.router.show("first").published, "the first fork's root in the store")
    wait_for(lambda: node.bases.hot_sets.peek(PREFIX, "deb"), "the look for a hot set")
    memory.set_down(True)
    node.host.pause(20.0)  # so that the background's put cannot hide among what create does
    before = memory.total()
    with delayed(memory, 0.2):
        status = node.fork("second", "base:deb")
        assert memory.total() == before
    assert status.state == "serving"
    assert status.size == 256 * MIB
    assert not status.published
    memory.set_down(False)
    node.host.resume()
    assert node.core("second").pread(0, len(DATA)) == DATA
    wait_for(lambda: node.router.show("second").published, "the root in the store")
    root, _ = lease.read_root(memory, PREFIX, "second")
    assert (root.source, root.owner_node) == ("base:deb", "a")


def test_concurrent_first_forks_share_one_load(
    node: Node, make_node: MakeNode, memory: CountingStore
) -> None:
    node.base("deb", DATA)
    other = make_node("b")
    memory.gets.clear()
    errors: list[BaseException] = []

    def fork(number: int) -> None:
        try:
            other.fork(f"f{number}", "base:deb")
        except BaseException as error:
            errors.append(error)

    with delayed(memory, 0.05):
        threads = [threading.Thread(target=fork, args=(i,)) for i in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    wait_for(lambda: other.bases.hot_sets.peek(PREFIX, "deb"), "the look for a hot set")
    assert memory.gets.count(f"{PREFIX}/bases/deb/manifest") == 1
    assert memory.gets.count(f"{PREFIX}/bases/deb/hot-set") == 1
    roots = [other.router.table.get(f"f{i}").volume for i in range(64)]
    pages = {id(volume.root.inline_page) for volume in roots if volume}
    assert len(pages) == 1  # the shared object, not copies


def test_forks_are_isolated_from_each_other_and_the_base(node: Node) -> None:
    node.base("deb", DATA)
    for i in range(4):
        node.fork(f"f{i}", "base:deb")
    for i in range(4):
        node.core(f"f{i}").pwrite(i * BLOCK, bytes([i + 1]) * BLOCK)
    for name in ("f0", "f1"):
        node.router.drain(name)
    for i in range(4):
        want = bytearray(DATA)
        want[i * BLOCK : (i + 1) * BLOCK] = bytes([i + 1]) * BLOCK
        assert node.core(f"f{i}").pread(0, len(DATA)) == bytes(want)
    node.fork("clean", "base:deb")
    assert node.core("clean").pread(0, len(DATA)) == DATA


def test_a_fork_survives_a_restart_before_its_root_was_put(
    make_node: MakeNode, memory: CountingStore
) -> None:
    node = make_node()
    node.base("deb", DATA)
    node.fork("warm", "base:deb")
    wait_for(lambda: node.router.show("warm").published, "the root")
    memory.set_down(True)
    node.fork("f", "base:deb")
    node.core("f").pwrite(0, b"x" * BLOCK)
    node.close()
    memory.set_down(False)
    again = make_node()
    again.router.start()
    assert again.router.wait_tried(20)
    assert again.core("f").pread(0, 2 * BLOCK) == b"x" * BLOCK + DATA[BLOCK : 2 * BLOCK]
    again.router.drain("f")
    assert lease.read_root(memory, PREFIX, "f")[0].source == "base:deb"


def test_a_fork_that_lost_its_name_is_fenced(node: Node, make_node: MakeNode, memory: CountingStore) -> None:
    node.base("deb", DATA)
    other = make_node("b")
    other.fork("warm", "base:deb")
    node.fork("taken", "base:deb", wait=True)
    other.fork("taken", "base:deb")
    wait_for(lambda: other.router.show("taken").state == "fenced", "the fence")
    assert "a has it" in other.router.show("taken").reason
    assert node.router.show("taken").state == "serving"
    other.fork("mine", "base:deb", wait=True)
    with pytest.raises(ExportExists):
        node.fork("mine", "base:deb", wait=True)


def test_a_fork_whose_root_cannot_be_put_in_time_fails_loudly(
    make_node: MakeNode, memory: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(grace=3600.0)
    node.base("deb", DATA)
    node.fork("warm", "base:deb")
    wait_for(lambda: node.router.show("warm").published, "the root")
    node.bases.get(PREFIX, "deb")
    memory.set_down(True)
    node.fork("late", "base:deb")
    node.host.pause(20.0)  # no put is under way when the time is over
    later = SimpleNamespace(time=lambda: time.time() + 1000.0, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr("glidefs.writing.upload.time", later)  # more than a quarter of the grace period
    memory.set_down(False)
    node.host.resume()
    wait_for(lambda: node.router.show("late").state == "fenced", "the fence")
    assert "make the fork again" in node.router.show("late").reason


def test_sizes(node: Node, memory: CountingStore) -> None:
    node.base("deb", DATA)
    with pytest.raises(ConfigError, match="at least as many"):
        node.fork("small", "base:deb", size=MIB)
    with pytest.raises(ConfigError, match="needs a size"):
        node.create("none")
    assert node.fork("large", "base:deb", size=512 * MIB).size == 512 * MIB
    huge = 300 << 30  # three pages, where the base has one inline
    assert node.fork("huge", "base:deb", size=huge).size == huge
    core = node.core("huge")
    assert core.pread(0, len(DATA)) == DATA
    core.pwrite(huge - BLOCK, b"e" * BLOCK)
    assert core.pread(200 << 30, BLOCK) == bytes(BLOCK)
    node.router.drain("huge")
    root, _ = lease.read_root(memory, PREFIX, "huge")
    assert root.size == huge
    node.fork("of-huge", "volume:huge")
    assert node.core("of-huge").pread(huge - BLOCK, BLOCK) == b"e" * BLOCK
    assert node.core("of-huge").pread(0, len(DATA)) == DATA


def test_the_same_create_again(node: Node) -> None:
    node.base("deb", DATA)
    assert node.fork("f", "base:deb").created
    assert node.fork("f", "base:deb").created is False
    with pytest.raises(ExportExists):
        node.create("f", 256 * MIB)


def test_unknown_sources(node: Node) -> None:
    node.create("v", MIB)
    for source in ("base:none", "volume:none", "snapshot:v@3", "tag:none"):
        with pytest.raises(UnknownExport):
            node.fork("f", source)
    for source in ("disk:v", "snapshot:v@x", "snapshot:v"):
        with pytest.raises(ConfigError):
            node.fork("f", source)
    with pytest.raises(GlideError):
        node.fork("f", "base:../v")
    assert [status.name for status in node.router.listing()] == ["v"]


def test_a_fork_of_a_volume_commits_it_first(node: Node, make_node: MakeNode) -> None:
    node.create("v", 64 * MIB)
    node.core("v").pwrite(0, DATA)
    status = node.fork("f", "volume:v")
    assert not status.note
    assert node.core("f").pread(0, len(DATA)) == DATA
    node.core("v").pwrite(0, b"later" + bytes(4091))
    node.core("f").pwrite(BLOCK, b"fork" + bytes(4092))
    assert node.core("f").pread(0, BLOCK) == DATA[:BLOCK]
    assert node.core("v").pread(BLOCK, BLOCK) == DATA[BLOCK : 2 * BLOCK]
    other = make_node("b")
    status = other.fork("g", "volume:v")
    assert "node a" in status.note
    assert other.core("g").pread(0, len(DATA)) == DATA


def test_reads_of_the_second_fork_ask_nothing_of_the_store(node: Node, memory: CountingStore) -> None:
    data = os.urandom(40 * MIB)
    node.base("deb", data)
    node.fork("one", "base:deb")
    node.fork("two", "base:deb")
    for name in ("one", "two"):
        wait_for(lambda name=name: node.router.show(name).published, "the root")  # type: ignore[misc]
    wait_for(lambda: node.bases.hot_sets.peek(PREFIX, "deb"), "the look for a hot set")
    assert node.core("one").pread(0, len(data)) == data
    before = memory.total()
    assert node.core("two").pread(0, len(data)) == data
    assert memory.total() == before


def test_a_thousand_blocks_that_another_fork_has_read(
    make_node: MakeNode, memory: CountingStore, tmp_path: Path
) -> None:
    """Each of other content, over four chunks; the new fork's first reads of them."""
    node = make_node(cache_bytes=192 * MIB)
    want = {place: os.urandom(4096) * (BLOCK // 4096) for place in range(0, 4000, 4)}
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(4096 * BLOCK)
        for place, data in want.items():
            os.pwrite(file.fileno(), data, place * BLOCK)
    assert bless(memory, PREFIX, "deb", image).data_bytes == 1000 * BLOCK
    for name in ("one", "two"):
        node.fork(name, "base:deb", wait=True)
    wait_for(lambda: node.bases.hot_sets.peek(PREFIX, "deb"), "the look for a hot set")

    def read(name: str) -> None:
        for place, data in want.items():
            assert node.core(name).pread(place * BLOCK, BLOCK) == data, place

    before = memory.total()
    read("one")
    assert memory.total() - before >= len(want) / 2
    before = memory.total()
    read("two")
    assert memory.total() == before


def test_views_own_nothing_and_can_be_promoted(
    node: Node, make_node: MakeNode, memory: CountingStore
) -> None:
    node.base("deb", DATA)
    other = make_node("b")
    for each in (node, other):
        status = each.fork("view", "base:deb", read_only=True)
        assert status.read_only
        assert each.core("view").pread(0, len(DATA)) == DATA
        with pytest.raises(GlideError):
            each.core("view").pwrite(0, bytes(4096))
    with pytest.raises(UnknownExport):
        lease.read_root(memory, PREFIX, "view")
    promoted = node.router.forks.promote("view")
    assert not promoted.read_only
    node.core("view").pwrite(0, b"w" * 4096)
    node.router.drain("view")
    assert lease.read_root(memory, PREFIX, "view")[0].owner_node == "a"
    assert other.core("view").pread(0, len(DATA)) == DATA
    assert other.router.detach("view")["detached"]
    other.fork("view2", "base:deb", read_only=True)
    assert other.router.remove("view2")["removed"]
    assert lease.read_root(memory, PREFIX, "view")[0].owner_node == "a"  # not that of the view's name


@pytest.mark.parametrize("source", ["base:deb", "snapshot:v@2", "tag:t"])
def test_a_view_is_promoted_only_while_its_source_has_what_it_shows(
    node: Node, memory: CountingStore, source: str
) -> None:
    """What nothing names any more, gc may have deleted."""
    node.create("v", 64 * MIB, wait=True)
    node.core("v").pwrite(0, DATA)
    made = node.router.forks.snapshot("v", SnapshotRequest(tag="t"))["sequence"]
    node.router.forks.make_base("v", PromoteRequest(base="deb"))
    source = source.replace("@2", f"@{made}")
    node.fork("view", source, read_only=True)
    key = parse_source(source).key(PREFIX)
    memory.delete(key)
    node.bases.forget(PREFIX, "deb")
    with pytest.raises(UnknownExport):
        node.router.forks.promote("view")
    node.create("other", 64 * MIB)
    if source == "base:deb":
        node.router.forks.make_base("other", PromoteRequest(base="deb"))
    elif source == "tag:t":
        node.router.forks.tag("other", TagRequest(tag="t"))
    else:
        return
    with pytest.raises(NotSupported, match="changed"):
        node.router.forks.promote("view")
    assert node.router.show("view").state == "serving"


def test_a_read_only_volume_of_its_own_can_be_promoted(node: Node, memory: CountingStore) -> None:
    node.create("v", 64 * MIB, read_only=True)
    assert decode_root(manifest_key(PREFIX, "v"), memory.get(manifest_key(PREFIX, "v")).data).read_only
    assert not node.router.forks.promote("v").read_only
    node.core("v").pwrite(0, DATA)
    node.router.drain("v")
    assert not decode_root(manifest_key(PREFIX, "v"), memory.get(manifest_key(PREFIX, "v")).data).read_only


def test_a_view_is_there_again_after_a_restart(make_node: MakeNode, memory: CountingStore) -> None:
    node = make_node()
    node.base("deb", DATA)
    node.fork("view", "base:deb", read_only=True)
    node.close()
    again = make_node()
    again.router.start()
    assert again.router.wait_tried(20)
    assert again.router.show("view").read_only
    assert again.core("view").pread(0, len(DATA)) == DATA


def test_a_base_is_bit_identical_to_what_it_was_made_from(node: Node, memory: CountingStore) -> None:
    node.base("deb", DATA, size=8 * MIB, at=2 * MIB + 4096)
    node.fork("f", "base:deb")
    node.core("f").pwrite(0, b"z" * MIB)
    node.router.drain("f")
    image = node.home / "image"
    export_image(memory, PREFIX, "base:deb", image)
    want = bytearray(8 * MIB)
    want[2 * MIB + 4096 : 2 * MIB + 4096 + len(DATA)] = DATA
    assert image.read_bytes() == bytes(want)
    with pytest.raises(ExportExists):
        node.router.forks.make_base("f", PromoteRequest(base="deb"))


def test_no_forks_of_a_base_that_cannot_be_checked(make_node: MakeNode, memory: CountingStore) -> None:
    node = make_node(grace=0.4)
    node.base("deb", DATA)
    node.bases.get(PREFIX, "deb")
    threading.Event().wait(0.15)
    memory.set_down(True)
    node.bases._reads = node.store.view("read", 0.2)
    with pytest.raises(StoreError):
        node.fork("f", "base:deb")
    memory.set_down(False)
    node.bases._reads = node.store.view("read", 20.0)
    memory.delete(f"{PREFIX}/bases/deb/manifest")
    with pytest.raises(UnknownExport, match="removed"):
        node.fork("f", "base:deb")
    assert node.bases.manifests.peek(PREFIX, "deb") is None


def test_a_take_over_by_a_host_that_does_not_know_of_its_fence(node: Node, make_node: MakeNode) -> None:
    node.create("v", 64 * MIB)
    node.core("v").pwrite(0, DATA)
    node.router.drain("v")
    assert node.router.attach("v", AttachRequest(take_over=True)).state == "serving"  # it is ours: nothing
    other = make_node("b")
    other.router.attach("v", AttachRequest(take_over=True, transport="nbd"))
    other.core("v").pwrite(0, b"n" * 4096)
    other.router.drain("v")
    assert node.router.attach("v", AttachRequest(take_over=True, transport="nbd")).state == "serving"
    assert node.core("v").pread(0, 4096) == b"n" * 4096
    node.core("v").pwrite(4096, b"m" * 4096)
    node.router.drain("v")
    other.core("v").pwrite(0, bytes(4096))  # it has not heard of it yet
    with pytest.raises(Fenced):
        other.router.drain("v")
