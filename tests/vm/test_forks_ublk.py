"""Forks of one base as block devices, as microVMs or containers use them: each is mounted, and programs of
the image run in it under chroot. Every fork sees the base and its own writes, and the base stays as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("glidefs.core._core")
import device_rig as rig
from figures import Figures
from node import MIB, Node, stopwatch

pytestmark = [
    pytest.mark.skipif(rig.REASON is not None, reason=str(rig.REASON)),
    pytest.mark.skipif(shutil.which("busybox") is None, reason="busybox (static) is not installed"),
    pytest.mark.root,
    pytest.mark.timeout(2400 if rig.EMULATED else 600),
]

IMAGE_SIZE = 128 * MIB
FILES = 8 * MIB
FORKS = ("one", "two", "three")
TOOLS = ("sh", "cat", "find", "head", "mkdir", "rm", "sha256sum", "sort", "sync", "xargs", "tail", "wc")
SETTINGS = {
    "cache": {"log_size": '"512MiB"', "block_cache_size": '"256MiB"'},
    "daemon": {"drain_deadline": '"300s"'},
}

FIND = "cd /; find . -xdev -type f"
WRITE = """
set -e
cd /
sha256sum -c -s /etc/base.sums
mkdir /srv/own
i=0
while [ $i -lt 24 ]; do
    head -c $((i * 4099 + 1)) /dev/urandom > /srv/own/$i
    i=$((i + 1))
done
find srv/own -type f | sort | xargs sha256sum > /etc/own.sums
echo @NAME@ > /etc/hostname
victim=$(tail -n @NUMBER@ /etc/base.sums | head -n 1 | cut -c 67-)
rm "$victim"
echo "$victim" > /etc/removed
sync
"""
"""What each fork does to itself: new files of random bytes, a changed file, and one of the base less."""

CHECK = """
cd /
sha256sum -c -s /etc/own.sums || echo own files differ
grep -v "  $(cat /etc/removed)\\$" /etc/base.sums | sha256sum -c -s || echo files of the base differ
cat /etc/hostname
find . -xdev -type f | sort
"""


@pytest.fixture
def node(place: Path) -> Iterator[Node]:
    with rig.no_leftovers(), rig.ended(Node(place / "n", settings=SETTINGS)) as made:
        yield made.start()


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """An ext4 root with a shell and some hundred files; /etc/base.sums has the SHA-256 of those."""
    with rig.scratch() as made:
        yield make_image(made)


def make_image(place: Path) -> Path:
    tree = place / "tree"
    for name in ("bin", "dev", "etc", "srv", "proc"):
        (tree / name).mkdir(parents=True)
    shutil.copy2(str(shutil.which("busybox")), tree / "bin/busybox")
    for tool in (*TOOLS, "cut", "grep"):
        (tree / "bin" / tool).symlink_to("busybox")
    rig.run("mknod", tree / "dev/urandom", "c", "1", "9")
    sources = [path for path in rig.real_files(FILES) if not Path(path).is_symlink()]
    for source in sources:
        target = tree / source.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    assert len(sources) > 300
    (tree / "etc/hostname").write_text("base\n")
    names = place / "names"
    names.write_text("".join(f"{source.lstrip('/')}\0" for source in sources))
    (tree / "etc/base.sums").write_text(rig.run("xargs", "-0", "-a", names, "sha256sum", cwd=tree))
    made = place / "root.img"
    rig.run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, made, f"{IMAGE_SIZE // MIB}M")
    shutil.rmtree(tree)
    return made


def fork(node: Node, name: str, source: str, *options: str) -> str:
    """A fork over ublk; its device."""
    made: dict[str, Any] = node.json("create", name, "--from", source, *options)
    assert (made["transport"], made["size"], made["source"]) == ("ublk", IMAGE_SIZE, source), made
    assert made["device"].startswith("/dev/ublkb"), made
    return str(made["device"])


def inside(root: Path, script: str) -> str:
    """Run a script of the image's own shell with this root."""
    return rig.run("chroot", root, "/bin/sh", "-c", script)


def write(root: Path, name: str, number: int) -> None:
    inside(root, WRITE.replace("@NAME@", name).replace("@NUMBER@", str(number)))


def check(root: Path, name: str, of_base: set[str], *others: str) -> str:
    """That a fork shows the base, less what it removed, plus its own files and ``others``; their sums."""
    hostname, *files = inside(root, CHECK).splitlines()
    assert hostname == name
    removed = "./" + (root / "etc/removed").read_text().strip()
    assert removed in of_base
    own = {f"./srv/own/{i}" for i in range(24)} | {"./etc/own.sums", "./etc/removed", *others}
    assert set(files) == of_base - {removed} | own
    return (root / "etc/own.sums").read_text()


def same_as(node: Node, source: str, image: Path, place: Path) -> None:
    """That the store has exactly the image under this name."""
    out = place / "exported.img"
    node.json("export-image", source, str(out))
    rig.run("cmp", image, out)
    out.unlink()


def test_forks_under_chroot(node: Node, image: Path, place: Path, figure: Figures) -> None:
    before = len(rig.kernel_log())
    with stopwatch() as took:
        assert node.json("bless", str(image), "--name", "root")["created"]
    figure("bless", took[0], "s")
    view = fork(node, "view", "base:root", "--read-only")
    assert rig.run("blockdev", "--getro", view).strip() == "1"
    with ExitStack() as mounts:
        base = mounts.enter_context(rig.mounted(view, place / "view", "-o", "ro"))
        of_base = set(inside(base, FIND).split())
        devices = {name: fork(node, name, "base:root") for name in FORKS}
        assert len({view, *devices.values()}) == len(FORKS) + 1
        roots = {
            name: mounts.enter_context(rig.mounted(device, place / name)) for name, device in devices.items()
        }
        with stopwatch() as took, ThreadPoolExecutor() as pool:
            list(pool.map(write, roots.values(), FORKS, range(1, len(FORKS) + 1)))
        figure("chroots that write, side by side", took[0], "s")
        # What was written is read again from the devices, which a fresh daemon serves.
        node.kill()
        node.start()
        rig.drop_caches()
        sums = {name: check(root, name, of_base) for name, root in roots.items()}
        assert len(set(sums.values())) == len(FORKS)
        assert (
            set(inside(base, "cd /; sha256sum -c -s /etc/base.sums; find . -xdev -type f").split()) == of_base
        )
        same_as(node, "base:root", image, place)
    for name, device in devices.items():
        rig.run("e2fsck", "-f", "-n", device)
        with rig.mounted(device, place / name) as root:
            assert check(root, name, of_base) == sums[name]
    same_as(node, "base:root", image, place)
    rig.run("cmp", image, view)
    assert rig.io_errors(before) == []
    for name, device in {"view": view, **devices}.items():
        node.json("remove", name)
        assert not Path(device).exists()


def test_forks_of_forks_under_chroot(node: Node, image: Path, place: Path) -> None:
    """From a snapshot and from the volume itself, both taken while it is mounted and written."""
    before = len(rig.kernel_log())
    node.json("bless", str(image), "--name", "root")
    first = fork(node, "first", "base:root")
    devices = {"first": first}
    with ExitStack() as mounts:
        root = mounts.enter_context(rig.mounted(first, place / "first"))
        of_base = set(inside(root, FIND).split())
        write(root, "first", 1)
        kept = node.json("snapshot", "first")["source"]
        inside(root, "echo later > /etc/later; sync")
        devices["old"] = fork(node, "old", kept)
        devices["new"] = fork(node, "new", "volume:first")
        inside(root, "echo last > /etc/last; sync")
        seen = {"first": ("./etc/later", "./etc/last"), "old": (), "new": ("./etc/later",)}
        # Taken from a mounted file system, so mounting them replays its journal.
        roots = {"first": root}
        for name in ("old", "new"):
            roots[name] = mounts.enter_context(rig.mounted(devices[name], place / name))
        sums = {check(each, "first", of_base, *seen[name]) for name, each in roots.items()}
        assert len(sums) == 1
        for name, each in roots.items():
            inside(each, f"echo {name} > /etc/hostname; echo {name} > /srv/of-{name}; sync")
        rig.drop_caches()
        for name, each in roots.items():
            assert {check(each, name, of_base, *seen[name], f"./srv/of-{name}")} == sums
    for name, device in devices.items():
        rig.run("e2fsck", "-f", "-n", device)
        with rig.mounted(device, place / name) as each:
            assert {check(each, name, of_base, *seen[name], f"./srv/of-{name}")} == sums
    same_as(node, "base:root", image, place)
    assert rig.io_errors(before) == []
    for name in devices:
        node.json("remove", name)
