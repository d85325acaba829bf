"""Finds, downloads and unpacks the kernels that vm-test boots.

A kernel lives in ``CACHE/kernels/X.Y/``: ``vmlinuz``, ``lib/modules/RELEASE/`` with its depmod output, and
``complete``, written last, so an interrupted download is never mistaken for a kernel. One flock on the
cache serialises fetching. Nothing is written to the host's own apt configuration: the newer kernels come
from a suite that the host does not have, through an apt directory of our own inside the cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CACHE = Path(os.environ.get("GLIDEFS_VM_CACHE", "/var/cache/glidefs-vm"))
BACKPORTS_SUITE = "trixie-backports"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# Releases known to work; any other release of the same X.Y is taken only when these are gone.
PREFERRED = {"6.18": "6.18.15"}


class VmTestError(Exception):
    """A failure of the machinery (not of the command that was run in the VM)."""


class Kernel(NamedTuple):
    image: Path
    modules: Path
    release: str


def say(text: str) -> None:
    print(f"vm-test: {text}", file=sys.stderr, flush=True)


def run(argv: list[str], cwd: str | None = None, env: dict[str, str] | None = None) -> str:
    """Output of a helper program; its failure is a VmTestError that shows what it said."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=cwd, env=env)
    if done.returncode:
        raise VmTestError(f"{' '.join(argv[:3])}... failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


@contextlib.contextmanager
def cache_lock() -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def image_release(image: Path) -> str:
    """The release string in a bzImage header (Documentation/arch/x86/boot.rst, kernel_version)."""
    head = image.read_bytes()[: 64 << 10]
    if head[0x202:0x206] != b"HdrS" and head[0x1FE:0x200] != b"\x55\xaa":
        raise VmTestError(f"{image} is not an x86 kernel image")
    start = int.from_bytes(head[0x20E:0x210], "little") + 0x200
    return head[start : head.index(b"\0", start)].split(b" ")[0].decode()


def from_path(image: Path) -> Kernel:
    """A kernel given by the user: modules are looked for beside it, then in the host's /lib/modules."""
    image = image.resolve()
    release = image_release(image)
    for root in [*image.parents, Path("/")]:
        for sub in ("lib", "usr/lib"):
            modules = root / sub / "modules" / release
            if modules.is_dir():
                return Kernel(image, modules, release)
    raise VmTestError(f"no lib/modules/{release} above {image}")


def _private_apt() -> list[str]:
    """apt options that point at the backports suite, with lists and cache of our own."""
    lines = run(["apt-get", "indextargets", "--format", "$(CREATED_BY) $(REPO_URI)"]).splitlines()
    uris = {uri.rstrip("/") for kind, _, uri in (x.partition(" ") for x in lines) if kind == "Packages"}
    mirror = next((u for u in sorted(uris) if u.endswith("/debian")), None)
    if mirror is None:
        raise VmTestError("the host's apt has no Debian mirror to take a newer kernel from")
    base = CACHE / "apt"
    (base / "lists/partial").mkdir(parents=True, exist_ok=True)
    (base / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
    (base / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {BACKPORTS_SUITE} main\n")
    return [
        *("-o", f"Dir::Etc::sourcelist={base}/sources.list", "-o", "Dir::Etc::sourceparts=-"),
        *("-o", f"Dir::State::lists={base}/lists", "-o", f"Dir::Cache={base}/cache"),
        *("-o", "APT::Update::Post-Invoke-Success::="),
    ]


def _find_package(options: list[str], version: str) -> str | None:
    # A release's own kernel has the number of its ABI behind it, as 6.1.0-53; newer ones are 6.12.117+deb12.
    pattern = rf"^linux-image-({re.escape(version)}\.[0-9.]+)(-[0-9]+)?(\+deb[0-9]+)?-amd64$"
    found = run(["apt-cache", *options, "search", "--names-only", pattern])
    matches = [match for line in found.splitlines() if (match := re.match(pattern, line.split(" ")[0]))]
    if not matches:
        return None

    def key(match: re.Match[str]) -> tuple[bool, list[int]]:
        release, abi = match[1], match[2] or "-0"
        return release == PREFERRED.get(version), [int(x) for x in [*release.split("."), abi[1:]]]

    return max(matches, key=key)[0]


def _locate(version: str) -> tuple[list[str], str]:
    """apt options and package name for a kernel X.Y: the host's archive first, then backports."""
    package = _find_package([], version)
    if package is None and os.geteuid() == 0:
        run(["apt-get", "update", "-q"])
        package = _find_package([], version)
    if package is not None:
        return [], package
    options = _private_apt()
    run(["apt-get", *options, "update", "-q"])
    package = _find_package(options, version)
    if package is None:
        raise VmTestError(f"no linux-image-{version}.*-amd64 in the host's archive or in {BACKPORTS_SUITE}")
    return options, package


def _wanted(options: list[str], package: str) -> list[str]:
    """The package and, from Linux 7.0 on, the packages which hold its files."""
    depends = run(["apt-cache", *options, "depends", "--no-recommends", "--no-suggests", package])
    parts = re.findall(r"Depends: (linux-(?:binary|modules)-\S+)", depends)
    return [package, *sorted(set(parts))]


def _unpack(options: list[str], package: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=CACHE) as scratch:
        # apt fetches as an unprivileged user by default, who must be able to write here.
        os.chmod(scratch, 0o755)
        if os.geteuid() == 0 and "_apt" in Path("/etc/passwd").read_text():
            shutil.chown(scratch, "_apt")
        run(["apt-get", *options, "-q", "download", *_wanted(options, package)], cwd=scratch)
        tree = Path(scratch) / "tree"
        for deb in sorted(Path(scratch).glob("*.deb")):
            run(["dpkg", "-x", str(deb), str(tree)])
        if not (tree / "lib/modules").is_dir():
            (tree / "usr/lib").rename(tree / "lib")
        release = next((tree / "lib/modules").iterdir()).name
        run(["depmod", "-b", str(tree), release])
        images = [*(tree / "boot").glob("vmlinuz-*"), *(tree / "lib/modules" / release).glob("vmlinuz")]
        if not images:
            raise VmTestError(f"{package} holds no vmlinuz")
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        shutil.copy(images[0], target / "vmlinuz")
        (tree / "lib").rename(target / "lib")
        (target / "complete").write_text(package + "\n")


def fetch(version: str) -> Kernel:
    """The newest packaged kernel of release series X.Y, downloaded when it is not in the cache."""
    target = CACHE / "kernels" / version
    with cache_lock():
        if not (target / "complete").exists():
            options, package = _locate(version)
            say(f"fetching {package} into {target}")
            _unpack(options, package, target)
    return from_path(target / "vmlinuz")


def need_programs() -> None:
    """Installs the host programs that a boot needs, when they are missing."""
    packages = {
        "qemu-system-x86_64": "qemu-system-x86",
        "modprobe": "kmod",
        "busybox": "busybox-static",
        "file": "file",
        "mke2fs": "e2fsprogs",
    }
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = sorted({pkg for prog, pkg in packages.items() if shutil.which(prog, path=search) is None})
    if not missing:
        return
    if os.geteuid() != 0:
        raise VmTestError(f"install these first (or run as root): {' '.join(missing)}")
    say(f"installing {' '.join(missing)}")
    with cache_lock():
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing]
        try:
            run(install, env=env)
        except VmTestError:
            run(["apt-get", "update", "-q"])
            run(install, env=env)


def find_vng() -> str:
    """virtme-ng: from PATH, from the active virtual environment, or from one made in the cache."""
    search = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), str(CACHE / "venv/bin")]
    if "VIRTUAL_ENV" in os.environ:
        search.insert(1, os.environ["VIRTUAL_ENV"] + "/bin")
    found = shutil.which("vng", path=":".join(search))
    if found is None:
        with cache_lock():
            say(f"installing virtme-ng into {CACHE}/venv")
            run([sys.executable, "-m", "venv", str(CACHE / "venv")])
            run([str(CACHE / "venv/bin/pip"), "install", "-q", "virtme-ng"])
        found = str(CACHE / "venv/bin/vng")
    return found
