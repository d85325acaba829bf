"""The Prometheus text: complete, bounded, parseable."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
from daemon_harness import Daemon
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("glidefs.core._core")

from glidefs.api import wire
from glidefs.core.engine import EngineStats
from glidefs.core.figures import VolumeInfo, VolumeStats
from glidefs.daemon.metrics import BUCKET_UNIT, ExportFigures, Metrics, Snapshot, latency_buckets
from glidefs.exports.requests import ExportStatus


def figures(name: str) -> ExportFigures:
    info = VolumeInfo(**dict.fromkeys(VolumeInfo.__struct_fields__, 0))
    counts = [0] * 64
    counts[4] = 3  # [1024, 1536) ns
    counts[63] = 1
    empty = (0,) * 64
    stats = VolumeStats(
        ops=(4, 0, 0, 0),
        bytes=(16384, 0, 0, 0),
        errors=(0, 0, 0, 0),
        latency=(tuple(counts), empty, empty, empty),
        latency_sum_ns=(5000, 0, 0, 0),
        **dict.fromkeys(VolumeStats.__struct_fields__[5:], 0),
    )
    return ExportFigures(name=name, transport="nbd", info=info, stats=stats)


def status(name: str, state: str) -> ExportStatus:
    return ExportStatus(
        name=name,
        size=1,
        transport="nbd",
        device="",
        state=state,
        prefix="default",
        read_only=False,
        flush="local",
        volume_id="",
        log_id="",
    )


def test_text_parses_and_has_the_figures() -> None:
    engine = EngineStats(**dict.fromkeys(EngineStats.__struct_fields__, 7))
    snapshot = Snapshot(
        engine=engine,
        exports=[figures("a"), figures('b"\\')],
        statuses=[status("a", "serving"), status('b"\\', "serving"), status("c", "fenced")],
        troubles=1,
        store=None,
        started_at=time.time(),
    )
    families = {
        f.name: f for f in text_string_to_metric_families(Metrics(lambda: snapshot).render().decode())
    }
    assert families["glidefs_process_resident_memory_bytes"].samples[0].value > 1 << 20
    assert families["glidefs_log_limit_bytes"].samples[0].value == 7
    assert families["glidefs_troubles"].samples[0].value == 1
    states = {s.labels["state"]: s.value for s in families["glidefs_exports"].samples}
    assert states == {"serving": 2, "fenced": 1}
    # Also of an export that has no volume here any more.
    fenced = {s.labels["export"]: s.value for s in families["glidefs_fenced"].samples}
    assert fenced == {"a": 0, 'b"\\': 0, "c": 1}
    reads = {
        sample.labels["export"]: sample.value
        for sample in families["glidefs_operations"].samples
        if sample.labels["op"] == "read"
    }
    assert reads == {"a": 4, 'b"\\': 4}
    assert not [name for name in families if "shadow" in name]
    latency = families["glidefs_operation_seconds"].samples
    assert {sample.labels["op"] for sample in latency} == {"read"}
    assert [s.value for s in latency if s.name.endswith("_count") and s.labels["export"] == "a"] == [4]


def test_sums_take_the_place_of_exports() -> None:
    """Whatever happens to how many exports: the text stays as long, but for those that want attention."""
    one = figures("a")
    bad = replace(one, name="b", info=replace(one.info, failed=5, dirty_bytes=7, oldest_dirty_ns=1))
    snapshot = Snapshot(
        engine=None,
        exports=[replace(one, stats=None), replace(bad, stats=None)],
        totals=one.stats,
        statuses=[status("a", "serving"), status("b", "serving"), status("c", "fenced")],
        troubles=2,
        store=None,
        started_at=time.time(),
        shadow=True,
    )
    text = Metrics(lambda: snapshot).render().decode()
    families = {f.name: f for f in text_string_to_metric_families(text)}
    assert not [line for line in text.splitlines() if 'export="a"' in line]
    assert {s.labels["export"] for s in families["glidefs_fenced"].samples} == {"c"}
    assert [(s.labels["export"], s.value) for s in families["glidefs_volume_errno"].samples] == [("b", 5)]
    assert [(s.labels, s.value) for s in families["glidefs_dirty_bytes"].samples] == [({}, 7)]
    (oldest,) = families["glidefs_oldest_dirty_seconds"].samples
    assert oldest.labels == {}
    assert oldest.value > 0
    reads = [s for s in families["glidefs_operations"].samples if s.labels == {"op": "read"}]
    assert [s.value for s in reads] == [4]
    counts = [s for s in families["glidefs_operation_seconds"].samples if s.name.endswith("_count")]
    assert [(s.labels, s.value) for s in counts] == [({"op": "read"}, 4)]
    assert {s.labels["why"] for s in families["glidefs_shadow_skipped_sectors"].samples} == {
        "changed",
        "absent",
    }
    assert families["glidefs_connections"].samples[0].value == 0


def test_without_exports_there_are_sums() -> None:
    zero = VolumeStats(*(((0,) * 4,) * 3), ((0,) * 64,) * 4, (0,) * 4, *((0,) * 13))
    snapshot = Snapshot(engine=None, exports=[], totals=zero, statuses=[], store=None, started_at=time.time())
    text = Metrics(lambda: snapshot).render().decode()
    assert "\nglidefs_size_bytes 0\n" in text
    assert '\nglidefs_operations_total{op="write"} 0\n' in text


def test_sums_outlive_the_exports(make_daemon: Callable[..., Daemon]) -> None:
    """What a removed export did still counts: a counter that falls looks like a restart."""
    daemon = make_daemon()
    daemon.config.write_text(daemon.config.read_text().replace("export_metrics = true", ""))
    daemon.start()
    for name in ("a", "b"):
        daemon.client.call("PUT", f"/api/exports/{name}", {"size": "8MiB", "transport": "nbd"})
        daemon.io(name, "write -P 1 0 64k")
    before = daemon.samples("glidefs_operations_total", op="write")
    assert len(before) == 1
    assert before[0] >= 2
    daemon.client.call("DELETE", "/api/exports/a")
    assert daemon.samples("glidefs_operations_total", op="write") == before
    daemon.io("b", "write -P 1 0 64k")
    assert daemon.samples("glidefs_operations_total", op="write")[0] > before[0]
    assert daemon.samples("glidefs_size_bytes") == [8 << 20]


def test_buckets_are_cumulative_and_at_the_core_s_bounds() -> None:
    counts = [0] * 64
    counts[3] = 1  # below 1024 ns
    counts[4] = 2  # from 1024 ns
    buckets = dict(latency_buckets(tuple(counts)))
    assert buckets[repr(BUCKET_UNIT * 4)] == 1
    assert buckets[repr(BUCKET_UNIT * 8)] == 3
    assert buckets["+Inf"] == 3
    values = list(buckets.values())
    assert values == sorted(values)


def test_a_scrape_is_shared_until_a_verb(daemon: Daemon) -> None:
    """One that comes right after another is the same text; a verb's effect is in the next one."""

    def exports() -> list[str]:
        _, text = wire.request(daemon.client.path, "GET", "/metrics", timeout=60)
        return sorted(set(re.findall(r'glidefs_size_bytes\{export="([^"]*)"', text.decode())))

    for name in ("a", "b", "c"):
        exports()
        daemon.client.call("PUT", f"/api/exports/{name}", {"size": "1MiB"})
        assert name in exports()
    daemon.client.call("DELETE", "/api/exports/b")
    assert exports() == ["a", "c"]
    assert daemon.samples("glidefs_exports", state="serving") == [2]
