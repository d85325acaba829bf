"""Profiles and hot sets: what a boot reads is there before it asks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from fork_rig import BLOCK, MIB, PREFIX, CountingStore, Node, delayed
from waiting import wait_for

from glidefs.errors import ConfigError, NotSupported
from glidefs.exports.requests import ProfileRequest
from glidefs.formats.hot_set import decode_hot_set, encode_hot_set, make_hot_set
from glidefs.names import hot_set_key
from glidefs.reading.prefetch import windows

MakeNode = Callable[..., Node]
BLOCKS = [900, 3, 4, 5, 2000, 1500, 7, 1024, 60]  # chunk 0 is blocks 0 to 1023
SIZE = 512 * MIB


def base_with_blocks(node: Node, blocks: list[int]) -> dict[int, bytes]:
    node.create("origin", SIZE)
    content = {block: os.urandom(BLOCK) for block in blocks}
    for block, data in content.items():
        node.core("origin").pwrite(block * BLOCK, data)
    node.router.drain("origin")
    node.router.forks._lineage.make_base(PREFIX, _volume("origin"), "deb")
    node.router.remove("origin")
    return content


def _volume(name: str):  # type: ignore[no-untyped-def]
    from glidefs.names import parse_source

    return parse_source(f"volume:{name}")


def profiled(node: Node, name: str, reads: Callable[[], None], **wanted: float) -> dict[str, object]:
    """For the profile no time goes by before ``reads`` has returned."""
    result: dict[str, object] = {}
    over = threading.Event()
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() if over.is_set() else 0.0, sleep=time.sleep)

    def run() -> None:
        result.update(node.router.forks.profile(name, ProfileRequest(**(wanted or {"idle": 0.3}))))

    volume = node.router.table.get(name).volume
    assert volume is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glidefs.bases.profile.time", clock)
        thread = threading.Thread(target=run)
        thread.start()
        wait_for(lambda: volume.profiling, "the profile")
        reads()
        over.set()
        thread.join()
    assert not volume.profiling
    return result


def test_a_profile_is_the_first_touches_in_order(node: Node, memory: CountingStore) -> None:
    content = base_with_blocks(node, [*BLOCKS, 10, 11, 12])
    node.fork("boot", "base:deb", prefetch=False)
    core = node.core("boot")

    def reads() -> None:
        for block in [*BLOCKS, BLOCKS[0], BLOCKS[3]]:
            assert core.pread(block * BLOCK, BLOCK) == content[block]
        core.pread(3000 * BLOCK, BLOCK)  # zeros are not worth a request
        core.pwrite(100 * BLOCK, os.urandom(BLOCK))  # the fork's own
        core.pread(100 * BLOCK, BLOCK)

    result = profiled(node, "boot", reads)
    assert result["hot_blocks"] == len(BLOCKS)
    key = hot_set_key(PREFIX, "deb")
    hot_set = decode_hot_set(key, memory.get(key).data)
    assert list(hot_set.blocks()) == BLOCKS
    assert hot_set.manifest_hash == node.bases.get(PREFIX, "deb").manifest_hash


def test_blocks_that_the_fork_wrote_are_not_hot(node: Node) -> None:
    base_with_blocks(node, BLOCKS)
    node.fork("boot", "base:deb", prefetch=False)
    core = node.core("boot")
    core.pwrite(3 * BLOCK, os.urandom(BLOCK))
    core.pwrite(7 * BLOCK, b"x" * 4096)
    node.router.drain("boot")
    volume = node.router.table.get("boot").volume
    assert volume is not None
    volume.retire_committed()
    result = profiled(node, "boot", lambda: [core.pread(b * BLOCK, BLOCK) for b in (3, 4, 7)] and None)
    assert result["touched_blocks"] == 3
    assert result["hot_blocks"] == 1


def test_a_fork_gets_the_hot_set_of_its_base(node: Node, make_node: MakeNode, memory: CountingStore) -> None:
    content = base_with_blocks(node, [*BLOCKS, 10, 11, 12])
    node.bases.store_hot_set(PREFIX, "deb", make_hot_set(node.bases.get(PREFIX, "deb").manifest_hash, BLOCKS))
    other = make_node("b")
    other.fork("f", "base:deb")
    wait_for(lambda: other.engine.stats().cache_used >= len(BLOCKS), "the prefetch")
    wait_for(lambda: other.router.show("f").published, "the root")
    before = memory.total()
    for block in BLOCKS:
        assert other.core("f").pread(block * BLOCK, BLOCK) == content[block]
    assert memory.total() == before
    assert other.engine.stats().cache_used == len(BLOCKS)
    other.fork("cold", "base:deb", prefetch=False)


def test_the_hot_set_of_another_manifest_is_not_used(node: Node, memory: CountingStore) -> None:
    base_with_blocks(node, BLOCKS)
    key = hot_set_key(PREFIX, "deb")
    memory.put(key, encode_hot_set(make_hot_set(bytes(32), BLOCKS), key))
    assert not node.bases.hot_set(PREFIX, "deb").runs


def test_a_damaged_hot_set_harms_nobody(node: Node, memory: CountingStore) -> None:
    content = base_with_blocks(node, BLOCKS)
    memory.put(hot_set_key(PREFIX, "deb"), b"rubbish")
    node.fork("f", "base:deb")
    assert node.core("f").pread(3 * BLOCK, BLOCK) == content[3]
    assert node.router.show("f").state == "serving"


def test_removal_ends_a_prefetch(node: Node, make_node: MakeNode, memory: CountingStore) -> None:
    blocks = list(range(0, 2000, 4))
    base_with_blocks(node, blocks)
    node.bases.store_hot_set(PREFIX, "deb", make_hot_set(node.bases.get(PREFIX, "deb").manifest_hash, blocks))
    other = make_node("b", cache_bytes=128 * MIB)
    gate, get_range = threading.Event(), memory.get_range

    def held(key: str, offset: int, length: int, into: memoryview | None = None) -> bytes:
        if other.engine.stats().cache_used:  # the first window has come
            gate.wait(60)
        return get_range(key, offset, length, into)

    memory.get_range = held  # type: ignore[method-assign]
    with delayed(memory, 0.05):
        other.fork("f", "base:deb")
        wait_for(lambda: other.engine.stats().cache_used > 0, "the prefetch")
        other.router.remove("f")
        used = other.engine.stats().cache_used
        assert used < len(blocks)
        gate.set()
        other.host.prefetcher.close()
        assert other.engine.stats().cache_used <= used + 64


def test_refusals(node: Node) -> None:
    base_with_blocks(node, BLOCKS)
    node.create("v", MIB)
    with pytest.raises(NotSupported):
        node.router.forks.profile("v", ProfileRequest())
    node.fork("boot", "base:deb")

    def again() -> None:
        with pytest.raises(ConfigError):
            node.router.forks.profile("boot", ProfileRequest())

    profiled(node, "boot", again, stop_after=0.2)


def test_windows_sort_inside_and_keep_the_order_between() -> None:
    blocks = [500, *range(63), 9000, 3, 1, 2]
    first, second = windows(blocks, 1000)
    assert first == [(0, 63), (500, 1)]
    assert second == [(1, 3)]
