"""Bases, forks, snapshots and tags through the command line and the API of a real daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from daemon_harness import Daemon
from waiting import wait_for

from glidefs.api import wire

pytest.importorskip("glidefs.core._core")
pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")

Make = Callable[..., Daemon]
MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.write(b"\x07" * MIB)
        file.seek(40 * MIB)
        file.write(os.urandom(MIB))
        file.truncate(64 * MIB)
    return path


def test_the_life_of_a_base(daemon: Daemon, image: Path, tmp_path: Path) -> None:
    made = daemon.json("bless", str(image), "--name", "deb")
    assert made["created"]
    assert daemon.json("bless", str(image), "--name", "deb")["created"] is False
    assert [base["name"] for base in daemon.json("bases")] == ["deb"]

    fork = daemon.json("create", "f", "--from", "base:deb")
    assert (fork["size"], fork["source"], fork["transport"]) == (64 * MIB, "base:deb", "nbd")
    daemon.io("f", "read -P 7 0 1M", "read -P 0 1M 1M", "write -P 9 0 64k", "read -P 9 0 64k")
    view = daemon.json("create", "view", "--from", "base:deb", "--read-only")
    command = ["qemu-io", "-r", "-f", "raw", "-c", "read -P 7 0 1M", view["device"]]
    subprocess.run(command, check=True, timeout=60)
    assert "already" not in daemon.json("promote", "view")["note"]
    daemon.io("view", "write -P 5 0 4k", "read -P 5 0 4k", "read -P 7 4k 4k")

    kept = daemon.json("snapshot", "f", "--tag", "golden")
    daemon.io("f", "write -P 1 0 64k")
    assert [entry["source"] for entry in daemon.json("snapshots", "f")] == [kept["source"]]
    for name, source in (("a", kept["source"]), ("b", "tag:golden"), ("c", "volume:f")):
        daemon.json("create", name, "--from", source, "--wait")
    daemon.io("a", "read -P 9 0 64k", "read -P 7 64k 64k")
    daemon.io("b", "read -P 9 0 64k")
    daemon.io("c", "read -P 1 0 64k")
    promoted = daemon.json("promote", f"f@{kept['sequence']}", "--base", "deb2")
    assert promoted["base"] == "deb2"
    daemon.json("create", "d", "--from", "base:deb2")
    daemon.io("d", "read -P 9 0 64k")
    daemon.json("tag", "f", "golden")

    out = tmp_path / "out.raw"
    daemon.json("export-image", "base:deb", str(out))
    assert out.read_bytes() == image.read_bytes()

    daemon.json("snapshots", "f", "--delete", str(kept["sequence"]))
    assert daemon.json("snapshots", "f") == []
    daemon.json("remove", "f", "--purge")
    daemon.client.call("DELETE", "/api/bases/deb")
    assert "removed" in daemon.fails("create", "late", "--from", "base:deb")
    daemon.io("view", "read -P 5 0 4k", "read -P 7 40k 4k")


def test_mistakes_are_explained(daemon: Daemon, image: Path) -> None:
    daemon.json("bless", str(image), "--name", "deb")
    assert "--size" in daemon.fails("create", "f")
    assert "no base" in daemon.fails("create", "f", "--from", "base:none")
    assert "disk:x" in daemon.fails("create", "f", "--from", "disk:x")
    assert "fork" in daemon.fails("create", "f", "--from", "base:deb", "--size", "1MiB")
    assert "invalid" in daemon.fails("create", "f", "--from", "base:../x")
    daemon.json("create", "v", "--size", "1MiB")
    assert "not a fork of a base" in daemon.fails("profile", "v", "--until-idle")
    assert "no such snapshot" in daemon.fails("snapshots", "v", "--delete", "7")
    assert daemon.json("list")[0]["name"] == "v"


def test_a_profile_over_the_api(daemon: Daemon, image: Path) -> None:
    blessed = daemon.client.call("POST", "/api/bases/deb", {"image": str(image)})
    assert blessed["created"]
    daemon.json("create", "boot", "--from", "base:deb", "--no-prefetch")
    answer: dict[str, object] = {}
    wanted = {"stop_after": 8.0}
    thread = threading.Thread(
        target=lambda: answer.update(daemon.client.call("POST", "/api/exports/boot/profile", wanted))
    )
    thread.start()
    wait_for(lambda: daemon.client.call("GET", "/health")["waiting_verbs"], "the profile runs")
    threading.Event().wait(0.5)
    daemon.io("boot", "read -P 7 0 128k", "read 40M 256k")
    thread.join()
    assert answer["hot_blocks"] == 3
    daemon.json("create", "next", "--from", "base:deb")


def test_whether_a_base_is_warm(daemon: Daemon, image: Path) -> None:
    def head(name: str) -> int:
        return wire.request(daemon.client.path, "HEAD", f"/api/manifests/default/{name}", timeout=10)[0]

    daemon.json("bless", str(image), "--name", "early")
    daemon.stop()
    daemon.start()
    wait_for(lambda: head("early") == 200, "the warm-up at the start")
    daemon.json("bless", str(image), "--name", "deb")
    assert head("deb") == 404
    daemon.json("create", "f", "--from", "base:deb")
    assert head("deb") == 200
    assert head("none") == 404
