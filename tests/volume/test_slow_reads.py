"""Spans of slow reads, and their stages: by the core, and on threads that may wait."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bad_s3 import BUCKET, BadS3, Fault
from volume_rig import BLOCK, Rig
from waiting import wait_for

from glidefs.core.check import CoreError
from glidefs.errors import StoreUnavailable
from glidefs.host.host import Host
from glidefs.reading import slow
from glidefs.reading.ahead import Window
from glidefs.reading.slow import READS_A_SECOND, SlowReads
from glidefs.store.s3.client import S3Options
from glidefs.store.s3.store import S3Store
from glidefs.tracing.spans import ERROR, Span, Stages
from glidefs.volume.volume import Volume

DELAY = 0.25
SLOW = 0.2


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def put(self, span: Span) -> None:
        self.spans.append(span)

    def one(self, name: str = "read") -> Span:
        """The only span, once it is there."""
        wait_for(lambda: self.spans, "a span")
        (found,) = self.spans
        assert found.name == name
        return found


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[BadS3]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with BadS3() as server:
        yield server


@pytest.fixture
def s3_rig(tmp_path: Path, s3: BadS3) -> Iterator[Rig]:
    """Its hosts have a store that the core reads from by itself."""
    options = S3Options(endpoint_url=s3.endpoint, region="us-east-1", connect_timeout=20.0)
    store = S3Store(BUCKET, "root", options)
    made = Rig(tmp_path, store)  # type: ignore[arg-type]
    yield made
    for host, _ in list(made.live):
        made.stop(host)
    store.close()


def traced(rig: Rig, **settings: Any) -> tuple[Host, Kept]:
    kept = Kept()
    settings = {"read_ahead_bytes": 0, "slow_read": SLOW, "store_patience": 5.0} | settings
    return rig.host(sink=kept, **settings), kept


def cold(rig: Rig, host: Host, blocks: int = 4, name: str = "", data: bytes = b"") -> tuple[Volume, bytes]:
    """A volume whose blocks are in the store alone, at places that are known."""
    volume = rig.create(host, name=name)
    data = data or os.urandom(blocks * BLOCK)
    volume.core.pwrite(0, data)
    volume.drain(20)
    volume.retire_committed()
    host.engine.cache.evict_all()
    host.faults.carrier.prepare(volume, host.faults._reads, [0])
    return volume, data


def slow_down(rig: Rig, op: str, delay: float = DELAY) -> None:
    """Each call of an operation of the store in memory takes so long."""
    real = getattr(rig.memory, op)

    def slowly(*args: object) -> object:
        time.sleep(delay)
        return real(*args)

    setattr(rig.memory, op, slowly)


def stages(span: Span) -> list[str]:
    """Names of its stages, which are all of its time, one after the other."""
    edges = [span.begin, *(part.end for part in span.children)]
    assert edges == [*(part.begin for part in span.children), span.end]
    return [part.name for part in span.children]


def seconds(span: Span, *names: str) -> float:
    """Time in stages of these names."""
    return sum(part.end - part.begin for part in span.children if part.name in names) / 1e9


def test_a_read_that_the_core_carries(s3_rig: Rig, s3: BadS3) -> None:
    host, kept = traced(s3_rig)
    volume, data = cold(s3_rig, host, name="vm1")
    s3.delay = DELAY
    assert volume.core.pread(BLOCK, 4096) == data[BLOCK : BLOCK + 4096]
    span = kept.one()
    assert stages(span) == ["queue", "plan", "GET", "verify"]
    assert span.attributes == {
        "glidefs.export": "vm1",
        "glidefs.block": 1,
        "glidefs.blocks": 1,
        "glidefs.gets": 1,
        "glidefs.bytes": BLOCK,
    }
    assert seconds(span, "GET") >= DELAY
    assert seconds(span, "GET") > seconds(span, "queue", "plan", "verify")
    assert host.faults.carrier.begun == 1
    assert abs(span.end - time.time_ns()) < 60e9


def test_a_read_on_a_thread_that_may_wait(rig: Rig) -> None:
    host, kept = traced(rig)
    volume, data = cold(rig, host)
    slow_down(rig, "get_range")
    assert volume.core.pread(2 * BLOCK, 4096) == data[2 * BLOCK : 2 * BLOCK + 4096]
    span = kept.one()
    assert stages(span) == ["queue", "plan", "queue", "plan", "GET", "verify"]
    assert (span.attributes["glidefs.block"], span.attributes["glidefs.blocks"]) == (2, 1)
    assert (span.attributes["glidefs.gets"], span.attributes["glidefs.bytes"]) == (1, BLOCK)
    assert seconds(span, "GET") >= DELAY
    assert seconds(span, "GET") > seconds(span, "queue", "plan", "verify")


def test_an_index_that_is_loaded_first_is_part_of_the_plan(s3_rig: Rig, s3: BadS3) -> None:
    """A thread loads it, and the core fetches the block."""
    host, kept = traced(s3_rig)
    volume, data = cold(s3_rig, host)
    host.meta.indices.clear()
    shutil.rmtree(host.state_dir / "indices")
    s3.delay = DELAY
    assert volume.core.pread(0, 4096) == data[:4096]
    span = kept.one()
    assert stages(span) == ["queue", "plan"] * 3 + ["GET", "verify"]
    assert seconds(span, "plan") >= DELAY
    assert seconds(span, "GET") >= DELAY
    assert span.attributes["glidefs.gets"] == 1  # of data


def test_another_attempt_is_more_stages(rig: Rig) -> None:
    host, kept = traced(rig, slow_read=0.0)
    volume, data = cold(rig, host, 1)
    real, damaged = rig.memory.get_range, [True]

    def once_damaged(*args: Any) -> bytes:
        found = bytearray(real(*args))
        found[9] ^= damaged.pop() if damaged else 0
        return bytes(found)

    rig.memory.get_range = once_damaged  # type: ignore[method-assign, assignment]
    assert volume.core.pread(0, 4096) == data[:4096]
    span = next(span for span in wait_for(lambda: kept.spans, "a span") if span.name == "read")
    assert stages(span) == ["queue", "plan", "queue", "plan", "GET", "verify", "plan", "GET", "verify"]
    assert [part.attributes.get(ERROR) for part in span.children][5:] == ["CorruptObject", None, None, None]
    assert ERROR not in span.attributes
    assert span.attributes["glidefs.gets"] == 2


def test_what_the_core_could_not_get(s3_rig: Rig, s3: BadS3) -> None:
    """The store answers 503 once: a thread asks again."""
    host, kept = traced(s3_rig, slow_read=0.0)
    volume, data = cold(s3_rig, host, 1)
    real, failing = s3.hit, [Fault(503)]
    s3.hit = lambda method: failing.pop() if method == "GET" and failing else real(method)  # type: ignore[method-assign]
    assert volume.core.pread(0, 4096) == data[:4096]
    span = next(span for span in wait_for(lambda: kept.spans, "a span") if span.name == "read")
    assert stages(span) == ["queue", "plan", "GET", "queue", "plan", "GET", "verify"]
    assert [bool(part.attributes.get(ERROR)) for part in span.children] == [False, False, True] + [False] * 4


def test_a_read_that_fails_names_the_error(rig: Rig) -> None:
    host, kept = traced(rig)
    volume, _ = cold(rig, host, 1)
    (key,) = rig.packs()
    damaged = bytearray(rig.memory.get(key).data)
    damaged[16 + 9] ^= 1
    rig.memory.put(key, bytes(damaged))
    slow_down(rig, "get_range")
    with pytest.raises(CoreError) as caught:
        volume.core.pread(0, 4096)
    assert caught.value.errno == errno.EIO
    span = kept.one()
    assert span.attributes[ERROR] == "CorruptObject"
    assert span.children[-1].attributes[ERROR] == "CorruptObject"


def test_an_outage_is_told_with_each_time_that_is_given_up(rig: Rig) -> None:
    """The guest waits on; the next attempt is another span."""
    host, kept = traced(rig, store_patience=0.3)
    volume, _ = cold(rig, host, 1)
    real = rig.memory.get_range

    def fail(key: str, *_args: object) -> bytes:
        raise StoreUnavailable(f"{key}: away")

    rig.memory.get_range = fail  # type: ignore[method-assign, assignment]
    reader = threading.Thread(target=volume.core.pread, args=(0, 4096))
    reader.start()
    wait_for(lambda: len(kept.spans) >= 2, "two attempts")
    rig.memory.get_range = real  # type: ignore[method-assign]
    reader.join()
    for span in kept.spans[:2]:
        assert span.attributes[ERROR] == "StoreUnavailable"
        assert stages(span)[-2:] == ["GET", "pause"]
        assert span.children[-2].attributes[ERROR] == "StoreUnavailable"


def test_a_read_that_waits_for_the_bytes_of_another(s3_rig: Rig, s3: BadS3) -> None:
    host, kept = traced(s3_rig)
    first, data = cold(s3_rig, host, 1, name="vm1")
    second, _ = cold(s3_rig, host, 1, name="vm2", data=data)
    s3.delay = 2 * DELAY
    readers = [threading.Thread(target=volume.core.pread, args=(0, 4096)) for volume in (first, second)]
    readers[0].start()
    wait_for(lambda: host.faults.carrier.begun, "the GET is under way")
    readers[1].start()
    for reader in readers:
        reader.join()
    wait_for(lambda: len(kept.spans) == 2, "both spans")
    found = {span.attributes["glidefs.export"]: span for span in kept.spans}
    assert stages(found["vm1"]) == ["queue", "plan", "GET", "verify"]
    assert stages(found["vm2"]) == ["queue", "shared GET", "queue", "plan"]
    assert found["vm2"].attributes["glidefs.gets"] == 0


def test_a_read_that_waits_for_read_ahead(s3_rig: Rig, s3: BadS3) -> None:
    host, kept = traced(s3_rig)
    volume, data = cold(s3_rig, host)
    s3.delay = 2 * DELAY
    host.faults.prefetch_window(volume, Window(0, 2, -1 & ((1 << 64) - 1)))
    assert volume.core.pread(BLOCK, 4096) == data[BLOCK : BLOCK + 4096]
    span = kept.one()
    assert stages(span) == ["queue", "shared GET"]
    assert span.attributes["glidefs.block"] == 1


def test_what_is_fast_is_no_span(s3_rig: Rig) -> None:
    host, kept = traced(s3_rig, slow_read=60.0)
    volume, data = cold(s3_rig, host, 16)
    assert volume.core.pread(0, len(data)) == data
    wait_for(lambda: not host.faults.busy, "all is answered")
    assert not kept.spans


@pytest.mark.parametrize("kind", ["rig", "s3_rig"])
def test_nothing_is_noted_where_spans_go_nowhere(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig: Rig = request.getfixturevalue(kind)
    noted: list[str] = []
    monkeypatch.setattr(Stages, "__init__", lambda self, stage: noted.append(stage))
    monkeypatch.setattr(slow.Turn, "__init__", lambda self, waiting: noted.append("turn"))
    host = rig.host(slow_read=0.0)
    volume, data = cold(rig, host, 64)
    host.meta.indices.clear()
    shutil.rmtree(host.state_dir / "indices")
    readers = [threading.Thread(target=volume.core.pread, args=(0, len(data))) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert volume.core.pread(0, len(data)) == data
    assert not noted


def test_only_so_many_are_told_of_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one says how many were not."""
    kept, now = Kept(), 5 * 10**9
    monkeypatch.setattr(slow, "time", SimpleNamespace(monotonic_ns=lambda: now))
    reads = SlowReads(kept, 0.0, lambda cookie: None)

    def read() -> None:
        waited = Stages("queue")
        waited.begin = 0
        reads._ended("vm1", 0, 1, waited)

    for _ in range(READS_A_SECOND + 7):
        read()
    assert len(kept.spans) == READS_A_SECOND
    now += 10**9
    read()
    read()
    left_out = [span.attributes.get("glidefs.left_out") for span in kept.spans]
    assert left_out == [*[None] * READS_A_SECOND, 7, None]
