"""A handoff with a collector: what the predecessor had is sent, what the successor does too."""

from __future__ import annotations

import socket
from collections.abc import Callable

from handoff_rig import Generations
from span_collector import Collector

Make = Callable[..., Generations]


def test_both_processes_send_theirs(make_daemon: Make) -> None:
    with Collector() as collector:
        daemon = make_daemon()
        daemon.write_config(f'[telemetry]\notlp_endpoint = "{collector.endpoint}"')
        daemon.start()
        first = daemon.pid
        daemon.client.call("PUT", "/v1/exports/vm1", {"size": "16MiB", "transport": "nbd"})
        second = daemon.handoff()["pid"]
        daemon.client.call("PUT", "/v1/exports/vm2", {"size": "16MiB", "transport": "nbd"})
        (handoff,) = collector.wait("handoff")
        made = collector.wait("create", 2)
    pids = {span.attributes["glidefs.export"]: span.resource["process.pid"] for span in made}
    assert pids == {"vm1": first, "vm2": second}
    assert handoff.resource["process.pid"] == first


def test_a_collector_that_hangs_does_not_hold_a_handoff_up(make_daemon: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        daemon = make_daemon()
        port = silent.getsockname()[1]
        daemon.write_config(f'[telemetry]\notlp_endpoint = "http://127.0.0.1:{port}/v1/traces"')
        daemon.start()
        daemon.client.call("PUT", "/v1/exports/vm1", {"size": "16MiB", "transport": "nbd"})
        connection, _ = silent.accept()
        answer = daemon.handoff()
        assert answer["outcome"] == "succeeded"
        assert answer["stall"] < 2
        connection.close()
