"""Programs that people attach with: nbdinfo, nbdcopy, qemu-io, qemu-img, fio."""

from __future__ import annotations

import filecmp
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_serve import MIB, Served

SIZE = 96 * MIB
TIMEOUT = 240


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path) as made:
        made.add("disk", SIZE)
        yield made


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return done.stdout


def qemu_io(uri: str, *commands: str) -> str:
    arguments = [part for command in commands for part in ("-c", command)]
    output = run("qemu-io", "-f", "raw", "-t", "none", *arguments, uri)
    assert "failed" not in output, output
    return output


def sparse_image(path: Path, size: int, seed: int) -> None:
    """Data of odd lengths at odd places, holes between, something at both ends."""
    choose = random.Random(seed)
    with open(path, "wb") as image:
        image.truncate(size)
        for offset in [0, size - 5000, *(choose.randrange(size - 300_000) for _ in range(40))]:
            image.seek(offset)
            image.write(choose.randbytes(min(choose.randrange(1, 300_000), size - offset)))


# ---- nbdinfo ----


@needs("nbdinfo")
def test_nbdinfo(served: Served) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", served.server.uri("disk")))["exports"]
    assert export["export-size"] == SIZE
    assert export["is_read_only"] is False
    for name in ("can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_multi_conn"):
        assert export[name] is True, name
    host, port = served.tcp
    assert run("nbdinfo", "--size", f"nbd://{host}:{port}/disk").strip() == str(SIZE)


@needs("nbdinfo")
def test_nbdinfo_list_and_empty_name(served: Served) -> None:
    default = f"nbd+unix://?socket={served.path}"
    assert run("nbdinfo", "--size", default).strip() == str(SIZE)
    served.add("another", 2 * MIB, read_only=True)
    listed = json.loads(run("nbdinfo", "--json", "--list", default))["exports"]
    assert {export["export-name"]: export["export-size"] for export in listed} == {
        "disk": SIZE,
        "another": 2 * MIB,
    }
    done = subprocess.run(["nbdinfo", default], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "default export" in done.stderr


@needs("nbdinfo")
def test_nbdinfo_can_and_is(served: Served) -> None:
    served.add("base", MIB, read_only=True)
    for question in (("--can", "write"), ("--can", "multi-conn"), ("--can", "fua")):
        run("nbdinfo", *question, served.server.uri("disk"))
    run("nbdinfo", "--is", "read-only", served.server.uri("base"))


# ---- nbdcopy ----


@needs("nbdcopy")
@pytest.mark.parametrize("options", [(), ("--flush", "--connections=4"), ("--synchronous",)])
def test_nbdcopy_there_and_back(served: Served, tmp_path: Path, options: tuple[str, ...]) -> None:
    source, copy = tmp_path / "source.img", tmp_path / "copy.img"
    sparse_image(source, SIZE, seed=1)
    uri = served.server.uri("disk")
    run("nbdcopy", *options, str(source), uri)
    run("nbdcopy", *options, uri, str(copy))
    assert filecmp.cmp(source, copy, shallow=False)


@needs("nbdcopy")
def test_nbdcopy_over_old_data_and_between_volumes(served: Served, tmp_path: Path) -> None:
    first, second, copy = (tmp_path / name for name in ("first.img", "second.img", "copy.img"))
    sparse_image(first, SIZE, seed=2)
    sparse_image(second, SIZE, seed=3)
    served.add("other", SIZE)
    disk, other = served.server.uri("disk"), served.server.uri("other")
    run("nbdcopy", str(first), disk)
    run("nbdcopy", "--allocated", str(second), disk)
    run("nbdcopy", disk, other)
    run("nbdcopy", other, str(copy))
    assert filecmp.cmp(second, copy, shallow=False)


# ---- QEMU ----


@needs("qemu-io")
def test_qemu_io_patterns(served: Served) -> None:
    uri = served.server.uri("disk")
    qemu_io(
        uri,
        "write -P 0x11 0 1M",
        "write -P 0x22 512 512",
        "write -P 0x33 130560 1024",
        "read -P 0x11 0 512",
        "read -P 0x22 512 512",
        "read -P 0x11 1024 129536",
        "read -P 0x33 130560 1024",
        "flush",
        "discard 64k 64k",
        "read -P 0 64k 64k",
        "read -P 0x33 128k 512",
        "write -z 256k 300k",
        "read -P 0 256k 300k",
        "read -P 0x11 556k 468k",
        "write -z -u 600k 3584",
        "read -P 0 614400 3584",
        "read -P 0x11 617984 512",
        "write -P 0x44 -f 600k 4k",
        "read -P 0x44 600k 4k",
        "aio_write -P 0x55 2M 64k",
        "aio_write -P 0x66 4M 1M",
        "aio_flush",
        "read -P 0x55 2M 64k",
        "read -P 0x66 4M 1M",
    )
    qemu_io(uri, "read -P 0x44 600k 4k", f"read -P 0 {SIZE - MIB} 1M")


@needs("qemu-io")
def test_qemu_io_of_bytes_and_past_the_end(served: Served) -> None:
    """QEMU rounds what is not a multiple of the block size that we advertise."""
    uri = served.server.uri("disk")
    qemu_io(uri, "write -P 0x77 1000 3000", "read -P 0 0 1000", "read -P 0x77 1000 3000", "read -P 0 4000 96")
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", f"write {SIZE - 512} 1024", uri],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0


@needs("qemu-io")
def test_qemu_io_on_a_read_only_export(served: Served) -> None:
    served.volumes[1].pwrite(0, b"\x5a" * 4096)
    export = served.exports["disk"]
    served.exports["disk"] = type(export)(name="disk", size=SIZE, read_only=True, core=export.core)
    uri = served.server.uri("disk")
    output = run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x5a 0 4k", uri)
    assert "failed" not in output
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 4k", uri],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0


@needs("qemu-img")
def test_qemu_img_convert_and_compare(served: Served, tmp_path: Path) -> None:
    source, copy = tmp_path / "source.img", tmp_path / "copy.qcow2"
    sparse_image(source, SIZE, seed=4)
    uri = served.server.uri("disk")
    run("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", str(source), uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), uri)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, str(copy))
    assert "identical" in run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(copy), uri)
    assert json.loads(run("qemu-img", "info", "--output=json", uri))["virtual-size"] == SIZE


@needs("qemu-img")
def test_qcow2_inside_a_volume(served: Served, tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    sparse_image(source, 32 * MIB, seed=5)
    uri = served.server.uri("disk")
    run("qemu-img", "create", "-f", "qcow2", uri, "32M")
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", str(source), uri)
    run("qemu-img", "check", "-f", "qcow2", uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(source), uri)


# ---- fio ----


def fio(uri: str, **options: object) -> dict[str, object]:
    """One job; fio's nbd engine prints a line before its JSON."""
    arguments = [f"--{name}={value}" for name, value in options.items()]
    output = run("fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", "--output-format=json", *arguments)
    (job,) = json.loads(output[output.index("{") :])["jobs"]
    assert job["error"] == 0
    assert isinstance(job, dict)
    return job


def _has_fio_nbd() -> bool:
    if shutil.which("fio") is None:
        return False
    done = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, timeout=60, check=False)
    return "nbd" in done.stdout


needs_fio = pytest.mark.skipif(not _has_fio_nbd(), reason="fio with the nbd engine is not installed")


@needs_fio
@pytest.mark.parametrize("depth", [1, 32])
def test_fio_verifies_random_writes(served: Served, depth: int) -> None:
    fio(
        served.server.uri("disk"),
        rw="randwrite",
        bsrange="4k-128k",
        bs_unaligned=0,
        iodepth=depth,
        size="64M",
        io_size="96M",
        verify="crc32c",
        verify_fatal=1,
        verify_backlog=1024 if depth == 1 else 0,
        randseed=7,
    )


@needs_fio
def test_fio_mixed_reads_and_writes_with_fsync(served: Served) -> None:
    job = fio(
        served.server.uri("disk"),
        rw="randrw",
        bsrange="512-64k",
        bs_unaligned=0,
        blockalign="512",
        iodepth=16,
        fsync=32,
        size="48M",
        verify="crc32c",
        verify_fatal=1,
        randseed=8,
    )
    assert isinstance(job["write"], dict)
    assert job["write"]["total_ios"] > 0


@needs_fio
def test_fio_with_trims(served: Served) -> None:
    fio(served.server.uri("disk"), rw="randtrim", bs="64k", iodepth=8, size="32M")
    job = fio(served.server.uri("disk"), rw="trimwrite", bs="64k", iodepth=1, size="32M", verify="crc32c")
    assert isinstance(job["trim"], dict)


@needs_fio
def test_several_fio_processes_on_one_volume(served: Served) -> None:
    """Jobs with regions of their own, each over its connection, verify what they wrote."""
    uri = served.server.uri("disk")
    command = ["fio", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=4k-128k", "--iodepth=16"]
    command += ["--size=16M", "--verify=crc32c", "--verify_fatal=1", "--output-format=json"]
    for index in range(4):
        command += [f"--name=job{index}", f"--offset={index * 16}M"]
    output = run(*command)
    jobs = json.loads(output[output.index("{") :])["jobs"]
    assert [job["error"] for job in jobs] == [0] * 4
    assert os.path.isdir(served.directory / "logs" / "disk")
