"""libnbd with its own checks off, so that wrong requests reach the server."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nbd_serve import MIB, Served

SYSTEM_PYTHON = "/usr/bin/python3"
DRIVER = Path(__file__).with_name("libnbd_driver.py")
SIZE = 64 * MIB
FUA, NO_HOLE, DF, FAST_ZERO = 1, 2, 4, 16


def _has_libnbd() -> bool:
    try:
        done = subprocess.run(
            [SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, check=False, timeout=60
        )
    except OSError:
        return False
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not _has_libnbd(), reason="python3-libnbd is not installed")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("libnbd")) as made:
        made.add("disk", SIZE)
        made.add("base", SIZE, read_only=True)
        yield made


def run(served: Served, calls: list[dict[str, Any]], name: str = "disk", connections: int = 1) -> list[Any]:
    asked = {"uri": served.server.uri(name), "connections": connections, "calls": calls}
    done = subprocess.run(
        [SYSTEM_PYTHON, str(DRIVER)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: list[Any] = json.loads(done.stdout)
    return results


def pwrite(offset: int, data: bytes, **more: Any) -> dict[str, Any]:
    return {"call": "pwrite", "offset": offset, "data": data.hex(), **more}


def pread(offset: int, length: int, **more: Any) -> dict[str, Any]:
    return {"call": "pread", "offset": offset, "length": length, **more}


def test_facts(served: Served) -> None:
    (disk,) = run(served, [{"call": "facts"}])
    assert disk["size"] == SIZE
    assert disk["blocks"] == [512, 4096, 32 * MIB]
    for name in ("flush", "fua", "trim", "zero", "fast_zero", "multi_conn"):
        assert disk[name] is True, name
    assert (disk["df"], disk["cache"], disk["read_only"]) == (True, True, False)
    (base,) = run(served, [{"call": "facts"}], "base")
    assert (base["read_only"], base["trim"], base["zero"], base["flush"]) == (True, False, False, True)


def test_writes_read_back_with_fua_and_flush(served: Served) -> None:
    data = os.urandom(12 * 4096 + 512)
    results = run(
        served,
        [
            pwrite(MIB - 4096 - 512, data, flags=FUA),
            pread(MIB - 4096 - 512, len(data)),
            {"call": "flush"},
            pread(MIB - 8192, len(data) + 8192, flags=FUA),
            {"call": "flush", "flags": FUA},
            {"call": "trim", "offset": MIB, "length": 4096, "flags": FUA},
            pread(MIB, 8192),
            {"call": "zero", "offset": MIB + 4096, "length": 512, "flags": FUA | NO_HOLE},
            {"call": "zero", "offset": MIB + 4608, "length": 512, "flags": FAST_ZERO},
            pread(MIB + 4096, 4096),
            {"call": "shutdown"},
        ],
    )
    assert not any("errno" in result for result in results), results
    after = data[4096 + 512 :]
    assert results[1]["data"] == data.hex()
    assert bytes.fromhex(results[3]["data"])[3584 : 3584 + len(data)] == data
    assert bytes.fromhex(results[6]["data"]) == bytes(4096) + after[4096:8192]
    assert bytes.fromhex(results[9]["data"]) == bytes(1024) + after[5120:8192]


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (pread(1, 512), errno.EINVAL),
        (pread(0, 511), errno.EINVAL),
        (pwrite(256, bytes(512)), errno.EINVAL),
        (pwrite(0, b"x"), errno.EINVAL),
        ({"call": "trim", "offset": 100, "length": 4096}, errno.EINVAL),
        ({"call": "zero", "offset": 0, "length": 4095}, errno.EINVAL),
        (pread(SIZE, 512), errno.EINVAL),
        (pread(SIZE - 512, 1024), errno.EINVAL),
        (pread((1 << 63) - 512, 1024), errno.EINVAL),
        (pread((1 << 64) - 512, 1024), errno.EINVAL),
        (pwrite(SIZE, bytes(512)), errno.ENOSPC),
        (pwrite(SIZE - 512, bytes(1024)), errno.ENOSPC),
        (pwrite((1 << 64) - 512, bytes(1024)), errno.ENOSPC),
        ({"call": "zero", "offset": SIZE - 4096, "length": 8192}, errno.ENOSPC),
        ({"call": "zero", "offset": (1 << 64) - 4096, "length": 8192}, errno.ENOSPC),
        ({"call": "cache", "offset": SIZE, "length": 4096}, errno.EINVAL),
        (pread(0, 4096, flags=1 << 9), errno.EINVAL),
        (pwrite(0, bytes(4096), flags=NO_HOLE), errno.EINVAL),
        (pread(0, 33 * MIB), errno.EINVAL),
    ],
)
def test_wrong_requests_are_refused_and_the_connection_lives(
    served: Served, call: dict[str, Any], wanted: int
) -> None:
    refused, again, data = run(served, [call, pwrite(8 * MIB, b"ok" * 256), pread(8 * MIB, 512)])
    assert refused.get("errno") == wanted, refused
    assert again == {}
    assert bytes.fromhex(data["data"]) == b"ok" * 256


def test_trim_beyond_the_end_is_refused(served: Served) -> None:
    (result,) = run(served, [{"call": "trim", "offset": SIZE - 4096, "length": 8192}])
    assert result["errno"] in (errno.EINVAL, errno.ENOSPC)


def test_a_refused_write_changes_nothing(served: Served) -> None:
    results = run(
        served,
        [
            pwrite(SIZE - 4096, b"\xaa" * 4096),
            pwrite(SIZE - 2048, b"\xbb" * 4096),
            pwrite(SIZE - 4096 + 100, b"\xcc" * 512),
            {"call": "zero", "offset": SIZE - 4096, "length": 8192},
            pread(SIZE - 4096, 4096),
        ],
    )
    assert results[4]["data"] == "aa" * 4096


def test_read_only_export_refuses_with_eperm(served: Served) -> None:
    results = run(
        served,
        [
            pwrite(0, bytes(4096)),
            {"call": "trim", "offset": 0, "length": 4096},
            {"call": "zero", "offset": 0, "length": 4096},
            pread(0, 4096),
            {"call": "flush"},
        ],
        "base",
    )
    assert [result.get("errno") for result in results[:3]] == [errno.EPERM] * 3
    assert results[3]["data"] == "00" * 4096
    assert results[4] == {}


@pytest.mark.parametrize("durably", ["flush", "fua"])
def test_what_one_connection_wrote_the_other_reads(served: Served, durably: str) -> None:
    calls: list[dict[str, Any]] = []
    expected = []
    for step in range(40):
        data = os.urandom(4096)
        expected.append(data.hex())
        writer, reader = step % 4, (step + 1 + step // 4) % 4
        offset = 16 * MIB + (step % 3) * 4096
        calls.append(pwrite(offset, data, on=writer, flags=FUA if durably == "fua" else 0))
        if durably == "flush":
            calls.append({"call": "flush", "on": writer})
        calls.append(pread(offset, 4096, on=reader))
    results = run(served, calls, connections=4)
    assert [result["data"] for result in results if "data" in result] == expected


def test_a_request_of_the_largest_size(served: Served) -> None:
    pattern = os.urandom(512)
    results = run(
        served,
        [
            pwrite(SIZE - 32 * MIB, pattern, repeat=32 * MIB // 512),
            pread(SIZE - MIB, MIB),
            {"call": "zero", "offset": 0, "length": SIZE},
            pread(SIZE - 32 * MIB, 4096),
        ],
    )
    assert results[0] == {}
    assert results[1]["data"] == (pattern * 2048).hex()
    assert results[3]["data"] == "00" * 4096


def test_too_large_a_write_is_refused_or_ends_the_connection(served: Served) -> None:
    (result,) = run(served, [pwrite(0, bytes(512), repeat=33 * MIB // 512)])
    assert "errno" in result
    assert run(served, [pread(0, 512)])[0].get("errno") is None
