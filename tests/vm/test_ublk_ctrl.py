"""csrc/transport/ublk on a real driver: ``vm-test/run -- python -m pytest tests/vm/test_ublk_ctrl.py``."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from null_server import DEADLINE, NullServer, blockers, build, control, info, wait_until

REASON = blockers()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LIVE, QUIESCED = "1", "2"
LONG = os.environ.get("GLIDEFS_TEST_LENGTH") == "long"
QUIESCE, UPDATE_SIZE, USER_COPY = 1 << 12, 1 << 10, 1 << 7
MIB = 1 << 20


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("ublk_null"))


@pytest.fixture(scope="session")
def features(program: Path) -> int:
    return int(control(program, "features"), 16)


@pytest.fixture(autouse=True)
def _no_leftovers(program: Path) -> Iterator[None]:
    """Every test starts and ends without devices; a failed one must not take the next ones along."""
    yield
    left = [p.name.removeprefix("ublkc") for p in Path("/dev").glob("ublkc*")]
    for device_id in left:
        control(program, "del", device_id)
    assert not left, f"devices left behind: {left}"


@pytest.fixture(params=["user-copy", "copy"] if LONG else ["user-copy"])
def mode(request: pytest.FixtureRequest, features: int) -> list[str]:
    if request.param == "user-copy" and not features & USER_COPY:
        pytest.skip("this kernel has no user copy")
    return ["--copy"] if request.param == "copy" else []


def pattern(start: int, length: int) -> bytes:
    return b"".join(i.to_bytes(8, "little") for i in range(start, start + length, 8))


def dd(*args: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = ["dd", "status=none", *args]
    return subprocess.run(command, input=data, capture_output=True, timeout=DEADLINE, check=False)


def write_pattern(device: Path, start: int, length: int) -> None:
    """Direct writes, in requests of 64 KiB and of 4 KiB."""
    for block in (65536, 4096):
        options = [f"of={device}", f"bs={block}", f"seek={start // block}", "oflag=direct", "iflag=fullblock"]
        done = dd(*options, data=pattern(start, length))
        assert done.returncode == 0, done.stderr


def check_pattern(device: Path, start: int, length: int) -> None:
    done = dd(f"if={device}", "bs=64K", f"skip={start // 65536}", f"count={length // 65536}", "iflag=direct")
    assert done.returncode == 0, done.stderr
    assert done.stdout == pattern(start, length)


def test_life_with_a_crash(program: Path, mode: list[str]) -> None:
    """add, start, I/O, kill -9, recovery by a second server under the same name, I/O, stop, delete."""
    first = NullServer(program, "add", "7", "--check", *mode)
    device, number = first.device, first.device.stat().st_rdev
    assert first.mode == ("copy" if mode else "user-copy")
    assert info(program, 7)["state"] == LIVE
    assert info(program, 7)["opaque"] == "0x676c696465"
    write_pattern(device, 512 * MIB, MIB)
    check_pattern(device, 512 * MIB, MIB)

    first.kill()
    wait_until(lambda: info(program, 7)["state"] == QUIESCED, "the kernel notices the server's death")
    # I/O of now is held, not failed: the reader must still wait when the second server starts.
    reader = subprocess.Popen(
        ["dd", "status=none", f"if={device}", "bs=64K", "count=4", "iflag=direct"], stdout=subprocess.PIPE
    )
    with pytest.raises(subprocess.TimeoutExpired):
        reader.wait(1)

    second = NullServer(program, "recover", "7", "--check")
    assert reader.communicate(timeout=DEADLINE)[0] == pattern(0, 4 * 65536)
    assert reader.returncode == 0
    assert second.mode == first.mode
    assert device.stat().st_rdev == number
    assert info(program, 7)["pid"] == str(second.process.pid)
    write_pattern(device, 600 * MIB, MIB)
    check_pattern(device, 600 * MIB, MIB)

    second.stop()
    assert not device.exists()
    assert not Path("/dev/ublkc7").exists()


def test_kill_under_load_loses_nothing(program: Path, mode: list[str]) -> None:
    """Requests that the dead server had taken are given to the next one: the client sees no error."""
    server = NullServer(program, "add", "3", "--check", *mode)
    load = ["--rw=randread", "--bs=4k", "--iodepth=32", "--direct=1", "--ioengine=libaio", "--size=64M"]
    client = subprocess.Popen(
        ["fio", "--name=load", f"--filename={server.device}", *load, "--time_based", "--runtime=8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        for _ in range(2):
            sectors = Path("/sys/block/ublkb3/stat")
            before = int(sectors.read_text().split()[0])
            wait_until(lambda: int(sectors.read_text().split()[0]) > before + 100, "reads get through")  # noqa: B023
            server.kill()
            server = NullServer(program, "recover", "3", "--check")
        output = client.communicate(timeout=DEADLINE)[0]
    finally:
        client.kill()
    assert client.returncode == 0, output
    server.stop()


def test_writes_are_checked(program: Path, mode: list[str]) -> None:
    """A write that is not the pattern is an I/O error, so the checks above mean something."""
    server = NullServer(program, "add", "1", "--check", *mode)
    done = dd("if=/dev/zero", f"of={server.device}", "bs=64K", "seek=1", "count=1", "oflag=direct")
    assert done.returncode != 0
    assert b"Input/output error" in done.stderr
    server.stop()


def test_a_start_that_nobody_serves_times_out(program: Path) -> None:
    begin = time.monotonic()
    assert "del=0" in control(program, "hang", "5")
    assert time.monotonic() - begin < 30


def test_a_start_that_cannot_be_cancelled_is_given_up(program: Path) -> None:
    begin = time.monotonic()
    print(control(program, "mute", "5"))
    assert time.monotonic() - begin < 30


def test_stop_from_outside_retires_every_slot(program: Path) -> None:
    server = NullServer(program, "add", "2")
    control(program, "stop", "2")
    server.expect_release()
    assert not server.device.exists()
    control(program, "del", "2")


def test_errors_keep_their_names(program: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as gone:
        control(program, "del", "99")
    assert "(-19)" in gone.value.stderr
    server = NullServer(program, "add", "4")
    with pytest.raises(subprocess.CalledProcessError) as taken:
        control(program, "add", "4")
    assert "(-17)" in taken.value.stderr
    server.stop()


def test_any_id(program: Path) -> None:
    server = NullServer(program, "add", str(0xFFFFFFFF))
    assert server.device.exists()
    server.stop()


def test_resize(program: Path, features: int) -> None:
    if not features & UPDATE_SIZE:
        pytest.skip(f"this kernel has no UPDATE_SIZE (features {features:#x})")
    server = NullServer(program, "add", "6", "--check", "--sectors", "8192")
    assert Path("/sys/block/ublkb6/size").read_text().strip() == "8192"
    control(program, "resize", "6", "16384")
    assert Path("/sys/block/ublkb6/size").read_text().strip() == "16384"
    check_pattern(server.device, 6 * MIB, MIB)
    server.stop()


def test_quiesce_hands_over_without_a_kill(program: Path, features: int) -> None:
    if not features & QUIESCE:
        pytest.skip(f"this kernel has no QUIESCE (features {features:#x})")
    first = NullServer(program, "add", "8", "--check")
    write_pattern(first.device, 0, MIB)
    control(program, "quiesce", "8")
    first.expect_release()
    wait_until(lambda: info(program, 8)["state"] == QUIESCED, "the device is quiesced")
    second = NullServer(program, "recover", "8", "--check")
    check_pattern(second.device, 0, MIB)
    second.stop()
