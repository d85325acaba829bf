"""Volumes that move between two engines, as they do between two processes."""

from __future__ import annotations

import errno
import itertools
import os
import time
from pathlib import Path

import pytest
from core_handoff_rig import READ, WRITE, Client, MakeRig, Pair, request
from core_rig import BLOCK, SECTOR, Background, CoreRig, Vol, pattern
from waiting import wait_for

from glidefs.core import handoff
from glidefs.core.check import Closed, CoreError

# -- the log ------------------------------------------------------------------------------------------


def test_everything_acknowledged_is_there(pair: Pair) -> None:
    for i in range(100):
        pair.vol.core.pwrite(i * SECTOR, pattern(i, SECTOR))
    pair.warm()
    pair.vol.core.pwrite(3 * SECTOR, pattern(1003, SECTOR))
    pair.vol.core.zero(8 * SECTOR, 4 * SECTOR)
    for i in range(200, 260):
        pair.vol.core.pwrite(i * SECTOR, pattern(i, SECTOR))
    core = pair.move().core
    assert core.pread(3 * SECTOR, SECTOR) == pattern(1003, SECTOR)
    assert core.pread(8 * SECTOR, 4 * SECTOR) == bytes(4 * SECTOR)
    for i in [0, 1, 2, *range(12, 100), *range(200, 260)]:
        assert core.pread(i * SECTOR, SECTOR) == pattern(i, SECTOR), i
    core.pwrite(0, pattern(5000, BLOCK))
    core.flush()
    assert pair.vol.reopen().core.pread(0, BLOCK) == pattern(5000, BLOCK)


def test_a_log_that_is_empty(pair: Pair) -> None:
    pair.warm()
    core = pair.move().core
    core.pwrite(0, pattern(1, SECTOR))
    assert core.pread(0, SECTOR) == pattern(1, SECTOR)


def test_committed_segments_move_too(pair: Pair) -> None:
    """They are a free read cache: what is in them needs no store after the handoff."""
    for i in range(64):
        pair.vol.core.pwrite(i * SECTOR, pattern(i, SECTOR))
    pair.vol.commit(retire=False)
    pair.warm()
    core = pair.move().core
    with pair.new.hold():
        assert core.pread(5 * SECTOR, SECTOR) == pattern(5, SECTOR)
    core.retire(pair.vol.committed_seq)
    assert core.pread(5 * SECTOR, SECTOR) == pattern(5, SECTOR)
    assert pair.new.faults_seen


def test_a_position_that_does_not_match_is_refused(pair: Pair) -> None:
    pair.vol.core.pwrite(0, pattern(1, SECTOR))
    pair.warm()
    position = handoff.freeze(pair.vol.core)
    wrong = handoff.Position(position.first_seq, position.last_seq, position.last_end + 1)
    with pytest.raises(CoreError, match="the process before says") as raised:
        handoff.activate(pair.next.core, wrong)
    assert raised.value.errno == errno.ESTALE


def test_the_old_process_touches_nothing_after_the_move(pair: Pair, tmp_path: Path) -> None:
    for i in range(64):
        pair.vol.core.pwrite(i * SECTOR, pattern(i, SECTOR))
    pair.vol.commit()
    pair.vol.core.pwrite(0, pattern(9, SECTOR))
    assert list(pair.vol.dir.glob("*.spare"))
    pair.warm()
    handoff.freeze(pair.vol.core)
    before = {path.name for path in pair.vol.dir.iterdir()}
    with pytest.raises(CoreError, match="handed over"):
        pair.vol.core.seal()
    with pytest.raises(CoreError, match="handed over"):
        pair.vol.core.retire(1)
    pair.vol.close()
    assert {path.name for path in pair.vol.dir.iterdir()} == before


def test_going_on_after_a_handoff_that_failed(pair: Pair) -> None:
    pair.vol.core.pwrite(0, pattern(1, SECTOR))
    handoff.freeze(pair.vol.core)
    write = Background(lambda: pair.vol.core.pwrite(0, pattern(2, SECTOR)))
    flush = Background(pair.vol.core.flush)
    read = Background(lambda: pair.vol.core.pread(0, SECTOR))
    assert read.result() == pattern(1, SECTOR)
    time.sleep(0.1)
    assert not write.done
    assert not flush.done
    handoff.unfreeze(pair.vol.core)
    write.result()
    flush.result()
    assert pair.vol.core.pread(0, SECTOR) == pattern(2, SECTOR)


def test_answers_to_faults_wait_too(pair: Pair) -> None:
    pair.vol.base = {0: pattern(7, BLOCK)}
    with pair.old.hold():
        read = Background(lambda: pair.vol.core.pread(0, BLOCK))
        wait_for(lambda: pair.vol.core.info().parked == 1, "the read waits")
        handoff.freeze(pair.vol.core)
    wait_for(lambda: pair.old.faults_seen, "the fault is answered")
    time.sleep(0.1)
    assert not read.done
    handoff.unfreeze(pair.vol.core)
    assert read.result() == pattern(7, BLOCK)


def test_the_old_process_lets_everything_go_at_once(rig: CoreRig) -> None:
    """Workers end below open volumes: nothing is answered, whoever calls is told, and closing works."""
    client = Client()
    one, other = rig.vol(), rig.vol()
    one.core.pwrite(0, pattern(1, SECTOR))
    one.core.attach_nbd(client.server, 1)
    with rig.hold():
        client.send(request(READ, 1, BLOCK, SECTOR))
        waits = [Background(lambda vol=vol: vol.core.pread(BLOCK, SECTOR)) for vol in (one, other)]
        wait_for(lambda: (one.core.info().parked, other.core.info().parked) == (2, 1), "the reads wait")
        for vol in (one, other):
            handoff.freeze(vol.core)
        waits.append(Background(lambda: one.core.pwrite(0, pattern(2, SECTOR))))
        client.send(request(WRITE, 2, 0, SECTOR), pattern(3, SECTOR))
        moving = [os.dup(fd) for fd, _ in handoff.connections(one.core)]
        before = {path: path.read_bytes() for path in one.dir.iterdir()}
        rig.engine.end_workers()
        for wait in waits:
            with pytest.raises(Closed):
                wait.result()
    for call in (one.core.info, one.core.sync, one.core.seal, lambda: one.core.pread(0, SECTOR)):
        with pytest.raises(Closed):
            call()
    one.close()
    other.close()
    assert client.quiet()
    assert {path: path.read_bytes() for path in one.dir.iterdir()} == before
    for fd in moving:
        os.close(fd)


def test_workers_end_while_they_are_asked(make_rig: MakeRig) -> None:
    """Every call from any thread ends: answered, or told that it comes too late."""
    for number in range(20):
        rig = make_rig()
        volumes = [rig.vol() for _ in range(3)]
        callers = [Background(lambda vol=vol: ask_for_ever(vol)) for vol in volumes * 2]
        time.sleep(0.002 * number)
        rig.engine.end_workers()
        for caller in callers:
            with pytest.raises(Closed):
                caller.result()


def ask_for_ever(vol: Vol) -> None:
    for i in itertools.count():
        vol.core.pwrite(i % 64 * SECTOR, pattern(i, SECTOR))
        vol.core.info()


# -- the block cache --------------------------------------------------------------------------------


def test_fills_wait_while_the_cache_is_given(pair: Pair) -> None:
    handoff.give_cache(pair.old.engine)
    fill = Background(lambda: pair.old.insert(pattern(1, BLOCK)))
    time.sleep(0.1)
    assert not fill.done
    handoff.take_cache(pair.old.engine)
    pair.old.engine.cache.unpin(fill.result())


def test_the_new_process_finds_what_was_cached_late(pair: Pair) -> None:
    pair.warm()
    slot = pair.old.insert(pattern(1, BLOCK))
    pair.old.engine.cache.unpin(slot)
    pair.move()
    found = pair.new.engine.cache.lookup([slot.hash])[0]
    assert found is not None
    assert not found.verified
    assert bytes(pair.new.engine.cache.read(found)) == pattern(1, BLOCK)
    pair.new.engine.cache.unpin(found)
