"""Spans on their way to a collector, and what happens where there is none."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import servers
from span_collector import Collector
from waiting import wait_for

from glidefs.errors import ConfigError
from glidefs.tracing import exporter
from glidefs.tracing.exporter import Exporter
from glidefs.tracing.otlp import Sender
from glidefs.tracing.spans import ERROR, Span, Stages

ROOT = Path(__file__).resolve().parents[2]


def span(name: str = "read") -> Span:
    now = time.time_ns()
    return Span(name=name, begin=now - 1000, end=now, attributes={"glidefs.export": "v1", "glidefs.block": 7})


def test_stages_are_the_whole_time() -> None:
    stages = Stages("queue")
    stages.enter("plan")
    copy = stages.fork()
    stages.enter("GET", stages.begin - 1)  # not before the stage that it follows
    stages.fail(TimeoutError())
    stages.enter("GET")
    stages.enter("verify")
    found = stages.span("read", {"glidefs.block": 1})
    assert [part.name for part in found.children] == ["queue", "plan", "GET", "GET", "verify"]
    edges = [found.begin, *(part.end for part in found.children)]
    assert edges == [*(part.begin for part in found.children), found.end]
    assert [part.attributes.get(ERROR) for part in found.children] == [None, None, "TimeoutError", None, None]
    assert found.attributes == {"glidefs.block": 1}
    assert abs(found.end - time.time_ns()) < 10e9
    copy.was("shared GET")
    copy.give_up(ValueError())
    other = copy.span("read", {})
    assert [part.name for part in other.children] == ["queue", "shared GET"]
    assert other.attributes == {ERROR: "ValueError"}
    assert stages.error == ""


def test_a_span_arrives_with_its_parts_and_attributes() -> None:
    with Collector() as collector:
        spans = Exporter(collector.endpoint, "node-1")
        stages = Stages("queue")
        stages.enter("GET")
        stages.give_up(TimeoutError())
        spans.put(stages.span("read", {"glidefs.export": "v1", "glidefs.block": 7}))
        spans.put(span("other"))
        spans.close(20)
        assert collector.requests == 1  # together
        (root,) = collector.roots("read")
        assert root.attributes == {"glidefs.export": "v1", "glidefs.block": 7, ERROR: "TimeoutError"}
        assert root.failed
        assert (root.parent, root.kind) == ("", 1)
        assert root.resource["service.name"] == "glidefs"
        assert root.resource["service.instance.id"] == "node-1"
        queue, get = collector.parts(root)
        assert (queue.name, queue.failed, get.name, get.failed) == ("queue", False, "GET", True)
        assert (queue.begin, queue.end, get.end) == (root.begin, get.begin, root.end)
        assert queue.trace == get.trace == root.trace


def test_the_trace_of_the_caller_goes_on() -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with Collector() as collector:
        spans = Exporter(collector.endpoint, "node-1")
        now = time.time_ns()
        for name, header in (
            ("sampled", f"00-{trace}-{parent}-01"),
            ("not sampled", f"00-{trace}-{parent}-00"),
            ("broken", "00-nonsense"),
        ):
            spans.put(Span(name=name, begin=now, end=now, answers={"traceparent": header}))
        spans.close(20)
        found = {span.name: span for span in collector.spans}
        assert set(found) == {"sampled", "broken"}
        assert (found["sampled"].trace, found["sampled"].parent, found["sampled"].kind) == (trace, parent, 2)
        assert found["broken"].parent == ""


def test_a_collector_that_is_away_is_one_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exporter, "LINGER", 0.01)
    monkeypatch.setattr("glidefs.tracing.otlp.TIMEOUT", 0.5)
    spans = Exporter(f"http://127.0.0.1:{servers.free_port()}/v1/traces", "node-1")
    began = time.monotonic()
    for _ in range(exporter.MOST_WAITING + 50):
        spans.put(span())
    assert time.monotonic() - began < 1  # nobody waits
    wait_for(lambda: not spans._waiting, "all are given up")
    spans.put(span())
    wait_for(lambda: not spans._waiting, "and the next")
    spans.close(20)
    (line,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.name == "glidefs.tracing.exporter"
    assert "spans did not reach http://127.0.0.1:" in line.getMessage()
    assert "\n" not in line.getMessage()


def test_what_is_lost_is_counted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(exporter, "SAY_EVERY", 0)
    monkeypatch.setattr(exporter, "MOST_WAITING", 10)
    with Collector() as collector:
        collector.status = 404
        spans = Exporter(collector.endpoint, "node-1")
        for _ in range(15):
            spans.put(span())
        spans.close(20)
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [line.split(" spans")[0] for line in lines] == ["15"]
    assert "404" in lines[0]


def test_a_connection_that_fails_is_told_in_a_few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glidefs.tracing.otlp.TIMEOUT", 2)
    sender = Sender(f"http://127.0.0.1:{servers.free_port()}/v1/traces", "node-1")
    assert sender.send([span()]) == "[Errno 111] Connection refused"


def test_the_end_does_not_wait_for_a_collector_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "LINGER", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        spans = Exporter(f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces", "node-1")
        spans.put(span())
        connection, _ = silent.accept()
        began = time.monotonic()
        spans.close()
        assert time.monotonic() - began < exporter.FLUSH + 0.5
        connection.close()


def test_what_is_missing_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(exporter, "find_spec", missing)
    with pytest.raises(ConfigError, match=r"pip install 'glidefs\[telemetry\]'") as caught:
        Exporter("http://127.0.0.1:4318/v1/traces", "node-1")
    assert str(caught.value).startswith("[telemetry] otlp_endpoint: ")


def test_nothing_of_opentelemetry_is_imported_without_need() -> None:
    """Nor once there is an exporter: that has its thread with the first span."""
    code = (
        "import sys, threading, glidefs.daemon.daemon, glidefs.api.app;"
        "from glidefs.tracing.exporter import Exporter;"
        "Exporter('http://127.0.0.1:1/v1/traces', 'n').close();"
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk.')],"
        "threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 1"
