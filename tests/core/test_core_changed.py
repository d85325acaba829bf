"""What changed since a snapshot: the core's part, windows of a manifest under the log (volume/changed.h)."""

from __future__ import annotations

import errno
import itertools
import socket
from collections.abc import Callable, Iterator

import pytest
from core_handoff_rig import Pair
from core_rig import BLOCK, MIB, SECTOR, CoreRig, Vol, pattern
from hypothesis import given, settings
from hypothesis import strategies as st
from nbd_client import BLOCK_STATUS, REQ_ONE, Extent, RawClient, RequestFailed
from waiting import wait_for

from glidefs.core import handoff
from glidefs.core.check import CoreError
from glidefs.core.engine import Fault
from glidefs.core.volume import MAX_SNAPSHOTS, Changed, NbdModes

SINCE = NbdModes(structured=True, changed=(7,))
SECTORS = BLOCK // SECTOR
ALL = 1 << 30

Windows = Callable[[Fault], Changed | int]
_ids = itertools.count(1)


def connect(vol: Vol, modes: NbdModes = SINCE) -> RawClient:
    mine, theirs = socket.socketpair()
    vol.core.attach_nbd(theirs.detach(), next(_ids), modes)
    client = RawClient(mine)
    client.context = 2
    return client


def window(vol: Vol, *edges: int, changed: bool = False) -> Windows:
    """One that begins where it is asked for and is as new as the last commit."""

    def tell(fault: Fault) -> Changed:
        assert (fault.snapshot, fault.chunks) == (7, 0)
        first = fault.block * SECTORS
        begun = changed ^ bool(sum(edge <= first for edge in edges) % 2)
        return Changed(first, ALL, begun, [edge for edge in edges if edge > first], vol.committed_seq)

    return tell


def asked(rig: CoreRig) -> int:
    """How often a window was asked for."""
    return sum(fault.ticket != 0 for fault in rig.faults_seen)


def test_the_log_on_top_of_a_window(rig: CoreRig) -> None:
    """! What is in the log beyond the manifest has changed, sectors, blocks and discards alike."""
    vol = rig.vol()
    vol.windows = window(vol, 8, 12)
    client = connect(vol)
    assert client.block_status(0, MIB) == [
        Extent(8 * SECTOR, 0),
        Extent(4 * SECTOR, 1),
        Extent(MIB - 12 * SECTOR, 0),
    ]
    vol.core.pwrite(2 * SECTOR, pattern(1, SECTOR))
    vol.core.pwrite(10 * SECTOR, pattern(2, 4 * SECTOR))
    vol.core.zero(BLOCK, 2 * BLOCK)
    vol.core.pwrite(4 * BLOCK + SECTOR, pattern(3, 512))
    want = [(2, 0), (1, 1), (5, 0), (6, 1), (18, 0), (64, 1), (33, 0), (1, 1), (126, 0)]
    assert client.block_status(0, MIB) == [Extent(count * SECTOR, state) for count, state in want]
    assert client.block_status(0, MIB, REQ_ONE) == [Extent(2 * SECTOR, 0)]
    assert client.block_status(2 * SECTOR + 512, 1024) == [Extent(1024, 1)]
    assert asked(rig) == 1, "a window is kept"
    client.close()


def test_what_the_manifest_has_is_the_window_s_to_tell(rig: CoreRig) -> None:
    """Segments that are committed stay in the log, and say nothing."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, BLOCK))
    vol.core.zero(BLOCK, BLOCK)
    vol.commit(retire=False)
    vol.windows = window(vol, 4, 5)
    client = connect(vol)
    assert client.block_status(0, MIB) == [
        Extent(4 * SECTOR, 0),
        Extent(SECTOR, 1),
        Extent(MIB - 5 * SECTOR, 0),
    ]
    client.close()


def test_a_window_does_not_outlive_what_the_log_gives_back(rig: CoreRig) -> None:
    """! It was made before a commit whose segments have gone since: another one is asked for."""
    vol = rig.vol()
    vol.windows = window(vol)
    client = connect(vol)
    assert client.block_status(0, MIB) == [Extent(MIB, 0)]
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.commit(retire=False)
    assert client.block_status(0, MIB) == [Extent(SECTOR, 1), Extent(MIB - SECTOR, 0)]
    assert asked(rig) == 1
    vol.windows = window(vol, 1, changed=True)
    vol.core.retire(vol.committed_seq)
    assert client.block_status(0, MIB) == [Extent(SECTOR, 1), Extent(MIB - SECTOR, 0)]
    assert asked(rig) == 2
    client.close()


def test_an_answer_that_comes_late_is_not_used(rig: CoreRig) -> None:
    """! Its manifest is older than what the log gave back while it was made."""
    vol = rig.vol()
    client = connect(vol)
    vol.core.pwrite(0, pattern(1, SECTOR))
    told = 0

    def tell(fault: Fault) -> Changed:
        nonlocal told
        told += 1
        if told == 1:
            vol.commit()
            return Changed(0, ALL, False, (), 0)
        return Changed(0, ALL, True, (1,), vol.committed_seq)

    vol.windows = tell
    assert client.block_status(0, MIB) == [Extent(SECTOR, 1), Extent(MIB - SECTOR, 0)]
    assert told == 2
    client.close()


def test_a_short_window(rig: CoreRig) -> None:
    """The answer ends where it ends, and the next one is asked for where the client goes on."""
    vol = rig.vol()
    vol.windows = lambda fault: Changed(
        fault.block * SECTORS, (fault.block + 1) * SECTORS, fault.block % 2 == 1, (), 0
    )
    client = connect(vol)
    assert client.block_status(BLOCK - SECTOR, MIB) == [Extent(SECTOR, 0)]
    assert client.block_status(BLOCK, MIB) == [Extent(BLOCK, 1)]
    assert client.map_of(2, MIB) == [Extent(BLOCK, state) for state in (0, 1) * 4]
    client.close()


def test_several_contexts(rig: CoreRig) -> None:
    """Each under its id, in one reply; the last chunk says that it is the last."""
    vol = rig.vol()
    vol.core.pwrite(0, pattern(1, SECTOR))
    vol.commit(retire=False)
    vol.windows = lambda fault: Changed(0, ALL, fault.snapshot == 9, (), vol.committed_seq)
    client = connect(vol, NbdModes(structured=True, allocation=True, changed=(7, 9)))
    assert client.statuses(0, MIB) == {
        1: [Extent(BLOCK, 0), Extent(MIB - BLOCK, 3)],
        2: [Extent(MIB, 0)],
        3: [Extent(MIB, 1)],
    }
    assert client.statuses(0, MIB, REQ_ONE)[1] == [Extent(BLOCK, 0)]
    client.close()
    many = NbdModes(structured=True, changed=tuple(range(MAX_SNAPSHOTS)))
    client = connect(vol, many)
    assert sorted(client.statuses(0, MIB)) == list(range(2, 2 + MAX_SNAPSHOTS))
    client.close()
    with pytest.raises(ValueError, match="at most"):
        NbdModes(structured=True, changed=tuple(range(MAX_SNAPSHOTS + 1))).to_c()


def test_errors(rig: CoreRig) -> None:
    vol = rig.vol()
    vol.windows = lambda fault: errno.ENOENT
    client = connect(vol)
    with pytest.raises(RequestFailed, match="snapshot of a context glidefs:changed: was deleted") as caught:
        client.block_status(0, MIB)
    assert caught.value.errno == 22
    vol.windows = lambda fault: errno.EIO
    with pytest.raises(RequestFailed) as caught:
        client.block_status(0, MIB)
    assert caught.value.errno == 5
    told = iter([0, 0, 0])  # three times to be asked again
    vol.windows = lambda fault: next(told, Changed(0, ALL, True, (), 0))
    assert client.block_status(0, MIB) == [Extent(MIB, 1)]
    with pytest.raises(RequestFailed, match="beyond the end"):
        client.block_status(1 << 40, SECTOR)
    client.close()


def test_a_deleted_snapshot_is_noticed_in_time(rig: CoreRig) -> None:
    """A window is not kept for ever."""
    vol = rig.vol()
    vol.windows = window(vol)
    client = connect(vol)
    assert client.block_status(0, MIB) == [Extent(MIB, 0)]
    vol.windows = lambda fault: errno.ENOENT

    def is_noticed() -> bool:
        try:
            client.block_status(0, MIB)
        except RequestFailed:
            return True
        return False

    wait_for(is_noticed, "the client hears of it", 20)
    client.close()


@pytest.mark.parametrize(
    ("first", "end", "edges"),
    [
        (0, 0, (1,)),
        (0, 10, (0,)),
        (0, 10, (10,)),
        (0, 10, (5, 5)),
        (0, 10, (6, 5)),
        (10, 10, ()),
        (10, 9, ()),
    ],
)
def test_windows_that_make_no_sense_are_refused(
    rig: CoreRig, first: int, end: int, edges: tuple[int, ...]
) -> None:
    vol = rig.vol()
    with pytest.raises(CoreError, match="not in order"):
        vol.core.install_changed(1, Changed(first, end, False, edges, 0))
    vol.core.install_changed(1, Changed(0, 10, False, (1, 9), 0))  # nobody waits: thrown away


def test_memory_of_windows_is_bounded(make_rig: Callable[..., CoreRig]) -> None:
    """Whatever clients there are; those that are over are asked for each time."""
    rig = make_rig(map_budget=64 * MIB)
    vol = rig.vol()
    edges = tuple(range(1, 20001))
    vol.windows = lambda fault: Changed(0, ALL, False, edges, 0)
    before = rig.engine.stats().map_bytes
    clients = [connect(vol) for _ in range(12)]
    for client in clients:
        assert client.block_status(0, 4 * SECTOR) == [Extent(SECTOR, state) for state in (0, 1, 0, 1)]
    assert 600_000 < rig.engine.stats().map_bytes - before < 1_300_000
    for client in clients:
        assert client.block_status(0, SECTOR) == [Extent(SECTOR, 0)]
        client.close()
    wait_for(lambda: rig.engine.stats().map_bytes - before < 20_000, "windows go with their connections")


def test_a_connection_that_ends_while_it_waits(rig: CoreRig) -> None:
    vol = rig.vol()
    with rig.hold():
        client = connect(vol)
        client.submit(BLOCK_STATUS, 0, MIB)
        wait_for(lambda: vol.core.info().parked == 1, "it waits")
        vol.core.detach_nbd(next(_ids) - 1)
        client.close()
    wait_for(lambda: vol.core.info().connections == 0, "it is gone")


def test_contexts_in_a_handoff(pair: Pair) -> None:
    """They go on in the new process, with a request that waited and one that comes."""
    modes = NbdModes(structured=True, allocation=True, changed=(7, 1 << 40))
    client = connect(pair.vol, modes)
    pair.vol.core.pwrite(0, pattern(1, SECTOR))
    with pair.old.hold():
        cookie = client.submit(BLOCK_STATUS, 0, MIB)
        wait_for(lambda: pair.vol.core.info().parked == 1, "it waits")
        handoff.freeze(pair.vol.core)
        ((_, connection),) = handoff.connections(pair.vol.core)
        assert connection.modes == modes
        handoff.unfreeze(pair.vol.core)
        pair.warm()
        pair.next.windows = lambda fault: Changed(0, ALL, fault.snapshot == 1 << 40, (), 0)
        pair.move()
    heard = client.chunks(cookie)
    assert [int.from_bytes(chunk.data[:4], "big") for chunk in heard] == [1, 2, 3]
    assert client.statuses(0, MIB)[2] == [Extent(SECTOR, 1), Extent(MIB - SECTOR, 0)]
    assert client.statuses(0, MIB)[3] == [Extent(MIB, 1)]
    client.close()


def test_a_handoff_that_is_called_off(rig: CoreRig) -> None:
    """An answer that came while the volume was frozen is used when it goes on."""
    vol = rig.vol()
    vol.windows = window(vol, 1)
    client = connect(vol)
    with rig.hold():
        cookie = client.submit(BLOCK_STATUS, 0, MIB)
        wait_for(lambda: vol.core.info().parked == 1, "it waits")
        handoff.freeze(vol.core)
    wait_for(lambda: rig.faults_seen, "it is answered")
    handoff.unfreeze(vol.core)
    (chunk,) = client.chunks(cookie)
    assert len(chunk.data) == 4 + 2 * 8
    client.close()


@pytest.fixture(scope="module")
def rig_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoreRig]:
    made = CoreRig(tmp_path_factory.mktemp("changed"))
    yield made
    made.close()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_window_under_any_log(rig_of_all: CoreRig, data: st.DataObject) -> None:
    """What is told is the window or the log, sector by sector, wherever a request begins and ends."""
    size, number = 40 * SECTORS, next(_ids)
    vol = Vol(rig_of_all, rig_of_all.tmp / f"log{number}", size * SECTOR).open()
    edges = data.draw(st.lists(st.integers(1, size - 1), unique=True, max_size=20).map(sorted))
    begun = data.draw(st.booleans())
    told_first = [begun ^ bool(sum(edge <= at for edge in edges) % 2) for at in range(size)]
    want = list(told_first)
    vol.windows = lambda fault: Changed(
        fault.block * SECTORS,
        size,
        told_first[fault.block * SECTORS],
        [edge for edge in edges if edge > fault.block * SECTORS],
        vol.committed_seq,
    )
    for late in (False, True):
        for _ in range(data.draw(st.integers(0, 5))):
            first = data.draw(st.integers(0, size - 1))
            end = min(size, first + data.draw(st.sampled_from([1, 2, 31, 32, 33, 100, 500])))
            if data.draw(st.booleans()):
                vol.core.zero(first * SECTOR, (end - first) * SECTOR)
            else:
                vol.core.pwrite(first * SECTOR, pattern(first, (end - first) * SECTOR))
            if late:
                want[first:end] = [True] * (end - first)
        if not late:
            vol.commit(retire=data.draw(st.booleans()))
    client = connect(vol)
    for _ in range(3):
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        at, told = start, list[bool]()
        while at < stop:
            extents = client.block_status(at * SECTOR, (stop - at) * SECTOR)
            assert all(one.flags != other.flags for one, other in itertools.pairwise(extents))
            for extent in extents:
                told += [extent.flags == 1] * (extent.length // SECTOR)
            at = start + len(told)
        assert told == want[start:stop]
    client.close()
    vol.close()
