"""What changed since a snapshot, as programs see it: nbdinfo and qemu-img against a real daemon."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from daemon_harness import Daemon

pytest.importorskip("glidefs.core._core")
needed = [program for program in ("nbdinfo", "qemu-io", "qemu-img") if shutil.which(program) is None]
pytestmark = pytest.mark.skipif(bool(needed), reason=f"not installed: {', '.join(needed)}")

MIB = 1 << 20


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def contexts(uri: str) -> list[str]:
    (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
    return [name for name in export.get("contexts", []) if name.startswith("glidefs:")]


def changed(uri: str, sequence: int) -> list[tuple[int, int]]:
    told = json.loads(run("nbdinfo", "--json", f"--map=glidefs:changed:{sequence}", uri))
    return [(extent["offset"], extent["length"]) for extent in told if extent["type"] & 1]


def test_what_changed_is_told_to_programs(daemon: Daemon) -> None:
    uri = daemon.json("create", "v", "--size", "64MiB", "--transport", "nbd")["device"]
    daemon.io("v", "write -P 1 0 1M")
    assert contexts(uri) == []
    first = daemon.json("snapshot", "v")["sequence"]
    daemon.io("v", "write -P 2 64k 64k", "discard 32M 1M", "write -P 3 512k 512")
    second = daemon.json("snapshot", "v")["sequence"]
    daemon.io("v", "write -P 4 63M 4k")
    assert contexts(uri) == [f"glidefs:changed:{sequence}" for sequence in (first, second)]
    before = [(65536, 65536), (524288, 4096), (32 * MIB, MIB)]
    last = (63 * MIB, 4096)
    assert changed(uri, first) == [*before, last]
    assert changed(uri, second) == [last]

    # A fork has none of its origin's, a view of a snapshot those of its volume.
    fork = daemon.json("create", "f", "--from", f"v@{first}")["device"]
    assert contexts(fork) == []
    view = daemon.json("create", "w", "--from", f"v@{second}", "--read-only")["device"]
    assert contexts(view) == contexts(uri)
    assert changed(view, first) == before
    assert changed(view, second) == []

    # QEMU takes any context as if it were base:allocation: what changed shows as a hole.
    options = f"driver=nbd,server.type=unix,server.path={daemon.base}/nbd.sock,export=v"
    image = f"{options},x-dirty-bitmap=glidefs:changed:{second}"
    told = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", image))
    assert [(part["start"], part["length"]) for part in told if not part["data"]] == [last]

    daemon.json("snapshots", "v", "--delete", str(first))
    assert contexts(uri) == [f"glidefs:changed:{second}"]
    done = subprocess.run(
        ["nbdinfo", f"--map=glidefs:changed:{first}", uri], capture_output=True, text=True, check=False
    )
    assert done.returncode
    daemon.stop()
    daemon.start()
    assert changed(uri, second) == [last]
