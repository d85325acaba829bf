"""One owner at a time: lost answers are ours, foreign roots fence, take-over fences the first."""

from __future__ import annotations

import logging
import random
import threading
import time

import msgspec
import pytest
from stored_roots import owner_of, put_root
from volume_rig import MIB, PREFIX, Rig, record_of
from waiting import wait_for

from glidefs.core.check import CoreError
from glidefs.core.engine import Engine
from glidefs.core.gather import log_segments
from glidefs.core.shadow import ShadowFile
from glidefs.core.volume import VolumeConfig
from glidefs.errors import ExportExists, Fenced, GlideError, OwnedElsewhere, StoreWentBack, UnknownExport
from glidefs.exports.stored import list_volumes
from glidefs.formats.manifest import NO_ID, encode_root
from glidefs.manifest import lease, local
from glidefs.names import manifest_key
from glidefs.volume import logs
from glidefs.volume.volume import Volume


def test_the_lost_answer_of_a_commit_is_our_own(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, b"a" * 4096)
    packs = rig.memory.requests["put"]
    # The pack's put is next, then that of the root.
    seen: list[str] = []
    original = rig.memory.put

    def put(key, data, **conditions):  # type: ignore[no-untyped-def]
        if key.endswith("/manifest") and not seen:
            seen.append(key)
            rig.memory.lose_answers("put")
        return original(key, data, **conditions)

    rig.memory.put = put  # type: ignore[method-assign]
    volume.drain(20)
    assert seen
    assert not volume.fenced
    assert rig.memory.requests["put"] > packs
    volume.core.pwrite(4096, b"b" * 4096)
    volume.drain(20)
    root, etag = lease.read_root(host.store, PREFIX, volume.name)
    assert (root, etag) == (volume.root, volume.etag)
    assert root.sequence == 2


def test_a_root_of_our_log_that_we_do_not_know_is_adopted_whole(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, b"a" * 4096)
    volume.drain(20)
    # As if an earlier life of this daemon had committed a label of its own after we read the root.
    ours = lease.next_root(volume.root, source="earlier")
    volume.committer._try(ours)
    put_root(host.store, manifest_key(PREFIX, volume.name), ours, if_match=volume.etag)
    volume.core.pwrite(8192, b"b" * 4096)
    volume.drain(20)
    assert not volume.fenced
    root, _ = lease.read_root(host.store, PREFIX, volume.name)
    assert root.source == "earlier"
    assert root.sequence == ours.sequence + 1
    volume.retire_committed()
    host.engine.cache.evict_all()
    assert volume.core.pread(0, 12288) == b"a" * 4096 + bytes(4096) + b"b" * 4096


def fenced(volume: Volume) -> bool:
    return bool(volume.fenced)


def test_a_foreign_root_fences(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    host = rig.host()
    volume = rig.create(host)
    told: list[str] = []
    volume.on_fenced = lambda v, why: told.append(why)
    foreign = lease.next_root(volume.root, log_id=lease.new_id(), owner_node="other")
    put_root(host.store, manifest_key(PREFIX, volume.name), foreign, if_match=volume.etag)
    volume.core.pwrite(0, b"a" * 4096)
    with caplog.at_level(logging.ERROR), pytest.raises(Fenced):
        volume.drain(20)
    wait_for(lambda: any("FENCED" in message for message in caplog.messages), "it is said")
    assert len(told) == 1
    assert "other" in told[0]
    for action in (lambda: volume.core.pread(0, 4096), lambda: volume.core.pwrite(0, bytes(4096))):
        with pytest.raises(CoreError) as caught:
            action()
        assert caught.value.errno == 5
    with pytest.raises(Fenced):
        volume.drain(1)
    assert log_segments(volume.log_dir)  # the log stays


def test_a_twin_is_fenced_loudly(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """! A cloned host has the same ids and the same log: only nonces tell who put a root."""
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, b"a" * 4096)
    volume.drain(20)
    twins = lease.next_root(volume.root)
    put_root(host.store, manifest_key(PREFIX, volume.name), twins, if_match=volume.etag)
    volume.core.pwrite(4096, b"b" * 4096)
    with caplog.at_level(logging.ERROR), pytest.raises(Fenced, match="a machine was cloned"):
        volume.drain(20)
    assert lease.read_root(host.store, PREFIX, volume.name)[0] == twins
    wait_for(lambda: any("FENCED" in message for message in caplog.messages), "it is said")
    assert log_segments(volume.log_dir)


@pytest.mark.parametrize("log", ["ours", "another"])
def test_a_store_that_went_back_is_not_adopted(rig: Rig, log: str) -> None:
    """! A restored bucket or a replica that lags: what is here is newer, and is not given up."""
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, b"1" * 4096)
    volume.drain(20)
    key = manifest_key(PREFIX, volume.name)
    old = volume.root if log == "ours" else msgspec.structs.replace(volume.root, log_id=lease.new_id())
    volume.core.pwrite(0, b"2" * 4096)
    volume.drain(20)
    newest, etag = volume.root, volume.etag
    rig.memory.delete(key)
    put_root(host.store, key, old)
    with pytest.raises(StoreWentBack, match="--accept-older"):
        volume.committer.poll(host.store)
    volume.core.pwrite(4096, b"3" * 4096)
    with pytest.raises(StoreWentBack, match="went back in time"):
        volume.drain(20)
    assert (volume.root, volume.fenced) == (newest, "")
    assert lease.read_root(host.store, PREFIX, volume.name)[0] == old
    assert volume.core.pread(0, 8192) == b"2" * 4096 + b"3" * 4096
    rig.memory.delete(key)
    put_root(host.store, key, newest)  # the replica has caught up; its ETags are others
    volume.drain(20)
    assert volume.etag != etag
    assert lease.read_root(host.store, PREFIX, volume.name)[0].sequence == newest.sequence + 1


def test_a_root_that_is_gone_fences(rig: Rig) -> None:
    host = rig.host()
    volume = rig.create(host)
    rig.memory.delete(manifest_key(PREFIX, volume.name))
    volume.core.pwrite(0, b"a" * 4096)
    with pytest.raises(Fenced):
        volume.drain(20)


def test_a_new_volume_that_lost_its_name_is_fenced(rig: Rig) -> None:
    host = rig.host()
    rig.create(host, name="disk")
    root = lease.empty_root("disk", 64 * MIB, owner_of("a"))
    volume = host.open(record_of(root, published=False), root, None)
    wait_for(lambda: fenced(volume), "the second volume of that name is fenced")
    with pytest.raises(ExportExists):
        lease.create(host.store, PREFIX, root)


def test_a_new_volume_is_published_in_the_background(rig: Rig) -> None:
    host = rig.host()
    root = lease.empty_root("disk", 64 * MIB, owner_of("a"))
    volume = host.open(record_of(root, published=False), root, None)
    wait_for(lambda: volume.record.root_published, "published")
    assert volume.committer.published
    assert lease.read_root(host.store, PREFIX, "disk")[0] == root
    volume.core.pwrite(0, b"x" * 4096)
    volume.drain(20)
    assert lease.read_root(host.store, PREFIX, "disk")[0].last_segment == volume.root.last_segment


def test_attach_refuses_and_takes_over(rig: Rig) -> None:
    first = rig.host("a")
    volume = rig.create(first)
    volume.core.pwrite(0, b"a" * 4096)
    volume.drain(20)
    volume.core.pwrite(4096, b"lost" * 1024)  # not uploaded when the other host takes it
    second = rig.host("b")
    with pytest.raises(OwnedElsewhere) as caught:
        rig.attach(second, volume.name)
    assert caught.value.node == "a"
    taken = rig.attach(second, volume.name, take_over=True)
    assert taken.log_id != volume.log_id
    assert taken.root.epoch == volume.root.epoch + 1
    assert taken.core.pread(0, 8192) == b"a" * 4096 + bytes(4096)
    with pytest.raises(Fenced):
        volume.drain(20)
    taken.core.pwrite(0, b"b" * 4096)
    taken.drain(20)
    # The log of the first is set aside, can be listed and exported.
    (info,) = [i for i in logs.list_logs(first.settings.log_dir, {(taken.id, taken.log_id)}) if not i.live]
    assert info.segments == 2  # one that was committed, one that was not
    out = rig.tmp / "export.img"
    extents, damage = logs.export_log(volume.log_dir, volume.id, volume.log_id, out)
    assert not damage.losses
    assert [(e.offset, e.length, e.zero) for e in extents][-1][1] % 4096 == 0
    assert out.read_bytes()[4096:8192] == b"lost" * 1024


def test_a_stale_owner_learns_of_its_fence_without_committing(rig: Rig) -> None:
    first = rig.host("a", poll_interval=0.1)
    volume = rig.create(first)
    rig.attach(rig.host("b"), volume.name, take_over=True)
    volume.core.pwrite(0, b"a" * 4096)
    wait_for(lambda: fenced(volume), "fenced by polling")


def test_a_stale_owner_learns_of_its_fence_from_a_compaction(rig: Rig) -> None:
    host = rig.host("a", compaction=True, compact_width=4, settle_idle=0.2)
    volume = rig.create(host)
    # Compaction comes when the other host has the volume already: nothing else looks at the store then.
    host.compactor.pause(time.monotonic() + 20)
    for i in range(6):
        volume.core.pwrite(i * 4096, b"a" * 4096)
        volume.drain(20)
    rig.attach(rig.host("b"), volume.name, take_over=True)
    host.compactor.resume()
    host.compactor.note(volume, frozenset({0}))
    wait_for(lambda: fenced(volume), "fenced by a compaction")
    with pytest.raises(CoreError):
        volume.core.pread(0, 4096)


@pytest.mark.parametrize("end", ["fenced", "closed"])
def test_an_upload_goes_no_further_than_its_volume(rig: Rig, end: str) -> None:
    """Who hears in the middle of an upload that the volume is another's, or that it closes, puts no more."""
    host = rig.host("a", pack_bytes=MIB, put_threads=1)
    volume = rig.create(host)
    for at in range(0, 8 * MIB, MIB):
        volume.core.pwrite(at, random.Random(at).randbytes(MIB))
    original, entered, go_on = rig.memory.put, threading.Event(), threading.Event()
    begun: list[str] = []

    def put(key, data, **conditions):  # type: ignore[no-untyped-def]
        if "/packs/" in key:
            begun.append(key)
            entered.set()
            assert go_on.wait(20)
        return original(key, data, **conditions)

    rig.memory.put = put  # type: ignore[method-assign]
    host.scheduler.request(volume, seal=True)
    assert entered.wait(20)
    if end == "fenced":
        rig.attach(rig.host("b"), volume.name, take_over=True)
        with pytest.raises(Fenced):
            volume.committer.poll(host.store)
        volume.fence("node b has it now")
        go_on.set()
        host.scheduler.forget(volume)  # waits for the job
    else:
        thread = threading.Thread(target=volume.close)
        thread.start()
        wait_for(lambda: volume.closing, "closing")
        go_on.set()
        thread.join(20)
        assert not thread.is_alive()
    assert len(begun) == 1
    assert lease.read_root(host.store, PREFIX, volume.name)[0].last_segment == 0


def test_detach_gives_the_volume_up(rig: Rig) -> None:
    host = rig.host("a")
    volume = rig.create(host)
    volume.core.pwrite(0, b"a" * 4096)
    volume.drain(20)
    root, etag = volume.root, volume.etag
    assert etag is not None
    volume.close()
    rig.memory.lose_answers("put")
    free, _ = lease.detach(host.store, PREFIX, root, etag)
    assert (free.owner_node, free.log_id, free.last_segment) == ("", NO_ID, 0)
    other = rig.attach(rig.host("b"), volume.name)
    assert other.core.pread(0, 4096) == b"a" * 4096


def test_the_store_says_which_host_has_a_volume(rig: Rig) -> None:
    """A name is no evidence: a host of the same name is offered it and does not have it."""
    host = rig.host("a")
    rig.create(host, name="mine")
    rig.create(rig.host("b"), name="theirs")
    found = {volume.name: volume for volume in list_volumes(host.store, PREFIX)}
    namesake = lease.Owner(lease.new_id(), "a")
    assert [found[name].owner_node for name in ("mine", "theirs")] == ["a", "b"]
    assert [volume.name for volume in found.values() if volume.is_candidate(namesake)] == ["mine"]
    assert not found["mine"].is_candidate(owner_of("a"))
    with pytest.raises(OwnedElsewhere):
        lease.attach(host.store, PREFIX, "mine", namesake)
    with pytest.raises(UnknownExport):
        lease.read_root(host.store, PREFIX, "nobody")


def test_the_local_copy_is_there_before_the_log_is_opened(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core unlinks what the root includes, so the host must know that root without the store."""
    host = rig.host("a")
    root = lease.empty_root("disk", 64 * MIB, owner_of("a"))
    etag = lease.create(host.store, PREFIX, root)
    key = manifest_key(PREFIX, "disk")
    seen: list[object] = []
    original = Engine.open_volume

    def open_volume(engine: Engine, config: VolumeConfig, shadow: ShadowFile | None) -> object:
        seen.append(local.load(host.state_dir, root.volume_id, key))
        return original(engine, config, shadow)

    monkeypatch.setattr(Engine, "open_volume", open_volume)
    host.open(record_of(root), root, etag)
    assert seen == [(root, etag, encode_root(root, key))]


def test_a_log_that_the_root_does_not_name_is_not_opened(rig: Rig) -> None:
    """! The log id is the fencing token: a log that was set aside is neither replayed nor deleted."""
    host = rig.host("a")
    volume = rig.create(host)
    volume.core.pwrite(0, b"a" * 4096)
    record = volume.record
    volume.close()
    root, etag = lease.attach(host.store, PREFIX, volume.name, owner_of("b"), take_over=True)
    with pytest.raises(GlideError, match="another log"):
        host.open(record, root, etag)
    assert log_segments(volume.log_dir)


def test_local_copy_is_durable_before_a_segment_may_go(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    host = rig.host()
    volume = rig.create(host)

    def fail(*_: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(local, "save", fail)
    volume.core.pwrite(0, b"a" * 4096)
    volume.drain(20)
    volume.retire_committed()
    assert log_segments(volume.log_dir)
    monkeypatch.undo()
    volume.core.pwrite(0, b"b" * 4096)
    volume.drain(20)
    volume.retire_committed()
    assert not log_segments(volume.log_dir)


def test_a_local_copy_that_failed_is_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """! Without one nothing may go, and where the log is full no other commit comes."""
    host = rig.host()
    volume = rig.create(host)

    def fail(*_: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(local, "save", fail)
    volume.core.pwrite(0, b"a" * 4096)
    volume.drain(20)
    assert volume.retirable() == 0
    monkeypatch.undo()
    wait_for(lambda: volume.retirable() == volume.root.last_segment, "the local copy")
    saved = local.load(host.state_dir, volume.id, manifest_key(PREFIX, volume.name))
    assert saved is not None
    assert saved[:2] == (volume.root, volume.etag)


def test_a_log_is_not_opened_without_a_local_copy(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """! What the root includes is unlinked then, and the next start would not know that root."""
    host = rig.host()
    volume = rig.create(host)
    volume.core.pwrite(0, b"a" * 4096)
    volume.drain(20)
    root, etag = volume.root, volume.etag
    volume.close()
    host.forget_state(volume.id)

    def fail(*_: object) -> None:
        raise OSError(5, "I/O error")

    monkeypatch.setattr(local, "save", fail)
    with pytest.raises(OSError, match="I/O error"):
        host.open(record_of(root), root, etag)
    assert log_segments(volume.log_dir)
    monkeypatch.undo()
    assert host.open(record_of(root), root, etag).core.pread(0, 4096) == b"a" * 4096


def test_segments_that_this_host_lost_are_not_mistaken_for_new_ones(rig: Rig) -> None:
    """A root of our log that includes more than was replayed here: its numbers are used again."""
    host = rig.host()
    volume = rig.create(host)
    ahead = lease.next_root(volume.root, last_segment=7)
    volume.committer._try(ahead)
    put_root(host.store, manifest_key(PREFIX, volume.name), ahead, if_match=volume.etag)
    volume.core.pwrite(0, b"a" * 4096)
    with pytest.raises(Fenced, match="lost"):
        volume.drain(20)
    assert log_segments(volume.log_dir)


def test_a_fork_whose_root_comes_too_late_is_failed_loudly(rig: Rig) -> None:
    host = rig.host(gc_grace=40.0)
    base = rig.create(host, name="base")
    base.core.pwrite(0, b"a" * 4096)
    base.drain(20)
    fork = lease.fork_root(base.root, "late", base.size, owner_of("a"), source="volume:base")
    late = msgspec.structs.replace(fork, created_at=fork.created_at - 11)
    volume = host.open(record_of(late, published=False), late, None)
    wait_for(lambda: fenced(volume), "failed")
    volume.close()
    in_time = host.open(record_of(fork, published=False), fork, None)
    in_time.drain(20)
    assert in_time.core.pread(0, 4096) == b"a" * 4096
