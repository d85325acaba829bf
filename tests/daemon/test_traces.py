"""Spans of a daemon in a process of its own, as a collector gets them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import servers
from api_rig import local
from bad_s3 import BadS3
from daemon_harness import ROOT, Daemon
from span_collector import Collector
from waiting import DEADLINE, wait_for

pytest.importorskip("glidefs.core._core")
pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")

Make = Callable[..., Daemon]
DELAY = 0.4
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SERVER = 2
"""The kind of a span that answers a request."""


def telemetry(endpoint: str) -> str:
    return f'[telemetry]\notlp_endpoint = "{endpoint}"\nslow_read = "{DELAY / 2:g}s"\n'


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture
def daemon(make_daemon: Make, collector: Collector) -> Daemon:
    return make_daemon(extra=telemetry(collector.endpoint)).start()


def test_where_the_time_of_a_slow_read_went(make_daemon: Make, collector: Collector, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(4 << 20))
    with BadS3() as s3:
        daemon = make_daemon()
        daemon.endpoint = s3.endpoint
        daemon.write_config(telemetry(collector.endpoint))
        daemon.start()
        daemon.client.call("POST", "/v1/bases/b", {"image": str(image)})
        daemon.client.call("PUT", "/v1/exports/vm1", {"source": "base:b", "transport": "nbd"})
        s3.delay = DELAY
        daemon.io("vm1", "read 2M 4k")
        reads = (span for span in collector.wait("read") if span.attributes["glidefs.block"] == 16)
        span = next(reads)
        daemon.kill()
    stages = collector.parts(span)
    assert {"queue", "plan", "GET", "verify"} == {stage.name for stage in stages}
    assert sum(stage.took for stage in stages) == pytest.approx(span.took, abs=1e-3)
    get = max(stages, key=lambda stage: stage.took if stage.name == "GET" else 0)
    assert get.took >= DELAY
    assert span.attributes["glidefs.export"] == "vm1"
    assert span.attributes["glidefs.bytes"] >= 128 << 10
    assert not span.failed
    assert (span.resource["service.name"], span.resource["service.instance.id"]) == ("glidefs", "node-1")


def test_verbs_are_spans_and_looks_are_none(daemon: Daemon, collector: Collector) -> None:
    door = local(daemon)
    header = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}
    assert door.ask("PUT", "/v1/exports/vm1", {"size": "16MiB"}, headers=header).status == 201
    assert door.ask("GET", "/v1/exports/vm1", headers=header).status == 200
    assert door.ask("POST", "/v1/exports/none/resize", {"size": "32MiB"}).status == 404
    assert door.ask("DELETE", "/v1/tags/none").status == 404
    (created,), (failed,), (other,) = (collector.wait(name) for name in ("create", "resize", "delete-tag"))
    assert (created.trace, created.parent, created.kind) == (TRACE, PARENT, SERVER)
    assert created.attributes == {
        "http.request.method": "PUT",
        "url.path": "/v1/exports/vm1",
        "http.response.status_code": 201,
        "glidefs.export": "vm1",
    }
    assert 0 < created.took < DEADLINE
    assert (failed.parent, failed.kind, failed.failed) == ("", SERVER, False)
    assert failed.attributes["http.response.status_code"] == 404
    assert failed.attributes["glidefs.problem"] == "unknown-name"
    assert failed.attributes["glidefs.export"] == "none"
    assert "glidefs.export" not in other.attributes
    assert {span.name for span in collector.spans} == {"create", "resize", "delete-tag"}


def test_what_is_left_is_sent_at_the_end(daemon: Daemon, collector: Collector) -> None:
    daemon.client.call("PUT", "/v1/exports/vm1", {"size": "16MiB"})
    daemon.stop()
    assert [span.name for span in collector.spans] == ["create"]


def test_a_collector_that_is_away_is_one_line(make_daemon: Make) -> None:
    endpoint = f"http://127.0.0.1:{servers.free_port()}/v1/traces"
    daemon = make_daemon(extra=telemetry(endpoint)).start()
    daemon.client.call("PUT", "/v1/exports/vm1", {"size": "16MiB"})
    wait_for(lambda: f"spans did not reach {endpoint}" in daemon.log_text, "the line")
    for number in range(20):
        daemon.client.call("POST", "/v1/exports/vm1/resize", {"size": f"{17 + number}MiB"})
    daemon.io("vm1", "write -P 5 0 64k", "read -P 5 0 64k")
    daemon.stop()
    lines = [line for line in daemon.log_text.splitlines() if "span" in line or "opentelemetry" in line]
    assert len(lines) == 1, lines
    assert "WARNING glidefs.tracing.exporter: " in lines[0]


def test_packages_that_are_missing_are_an_error_of_the_configuration(
    make_daemon: Make, tmp_path: Path
) -> None:
    daemon = make_daemon(extra=telemetry("http://127.0.0.1:4318/v1/traces"))
    hidden = tmp_path / "hidden"
    (hidden / "opentelemetry").mkdir(parents=True)
    (hidden / "opentelemetry" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "glidefs", "run", "-c", str(daemon.config)],
        env={**os.environ, "PYTHONPATH": f"{hidden}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("glidefs: [telemetry] otlp_endpoint: OpenTelemetry is not installed; pip install")
