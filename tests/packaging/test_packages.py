"""What `scripts/package` makes: the source archive by its list, the others on a fresh root (long)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import systemd_rig
from doc_blocks import blocks_of
from waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
LONG = os.environ.get("GLIDEFS_TEST_LENGTH") == "long"
pytestmark = pytest.mark.timeout(3600 if LONG else 600)
MIRROR = "http://deb.debian.org/debian"
NEEDED = (
    "csrc/glide_core.h",
    "csrc/blake3/blake3_avx2_x86-64_unix.S",
    "glidefs/core/build.py",
    "glidefs/api/static/index.html",
    "packaging/prometheus/glidefs.rules.yml",
    "packaging/grafana/glidefs.json",
    "docs/packages.md",
    "docs/pictures/fork.svg",
    "docs/tutorials/qemu.md",
    "packaging/glidefs.service",
    "packaging/debian/postinst",
    "scripts/install-service",
    "scripts/package",
    "tests/conftest.py",
    "vm-test/run",
    "Containerfile",
    "mkdocs.yml",
    "LICENSE",
)


def test_a_source_archive_has_all_that_is_kept_here(tmp_path: Path) -> None:
    """Also what setuptools would not think of: headers, units, documents, tests; programs stay programs."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout: what is kept is not known")
    tree = tmp_path / "tree"
    for name in done.stdout.splitlines():
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "out")],
        cwd=tree,
        capture_output=True,
        check=True,
    )
    (archive,) = (tmp_path / "out").iterdir()
    with tarfile.open(archive) as tar:
        members = {member.name.partition("/")[2]: member for member in tar.getmembers()}
    for name in NEEDED:
        assert name in members, name
        assert bool(members[name].mode & 0o100) == os.access(ROOT / name, os.X_OK), name


@contextlib.contextmanager
def fresh_root(path: Path, release: str) -> Iterator[Path]:
    """A minimal Debian, with what the kernel shows of itself."""
    subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=ca-certificates", release, str(path), MIRROR],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    # What this host needs to reach others, it needs too.
    for name in ("etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt"):
        shutil.copy(Path("/", name), path / name)
    mounted = [path / name for name in ("proc", "dev")]
    try:
        for target in mounted:
            subprocess.run(["mount", "--bind", f"/{target.name}", str(target)], check=True)
        yield path
    finally:
        for target in mounted:
            subprocess.run(["umount", "--lazy", str(target)], check=False)


def built(into: Path, *what: str) -> Path:
    """A package made of this tree."""
    if not LONG:
        pytest.skip("takes minutes: runs with GLIDEFS_TEST_LENGTH=long")
    if os.geteuid() or not shutil.which("debootstrap") or not shutil.which("qemu-io"):
        pytest.skip("needs root, debootstrap and qemu-io")
    subprocess.run([str(ROOT / "scripts/package"), "--dist", str(into), *what], check=True, cwd=ROOT)
    (made,) = into.iterdir()
    return made


SERVE = """
glidefs run --init-store >/tmp/daemon.log 2>&1 &
for i in $(seq 100); do glidefs list >/dev/null 2>&1 && break; sleep 0.2; done
glidefs create vm1 --size 64MiB --transport nbd
"""


class Inside:
    """Commands in a root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, command: str, timeout: float = 600) -> str:
        done = subprocess.run(
            ["chroot", str(self.root), "sh", "-c", command],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def apt_install(self, what: str) -> None:
        self.run(f"apt-get update -q && apt-get install -y -q --no-install-recommends {what}")

    def end_all(self) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.path.samefile(process / "root", self.root):
                    os.kill(int(process.name), signal.SIGTERM)
        time.sleep(1)


def guest(run: Path, command: str) -> None:
    """A client of the host; ``run`` is the directory of the daemon's sockets."""
    done = subprocess.run(
        ["qemu-io", "-f", "raw", f"nbd+unix:///vm1?socket={run}/nbd.sock", "-c", command],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "failed" not in done.stdout, done.stdout


def check_it_serves(inside: Inside) -> None:
    """A volume, a client of the host, two handoffs, a drain: nothing is lost. Ends the daemon."""
    sockets = inside.root / "run/glidefs"
    try:
        inside.run(SERVE)
        guest(sockets, "write -P 7 0 1M")
        assert "succeeded" in inside.run("glidefs handoff")
        assert inside.run("glidefs drain vm1") == "vm1: drained\n"
        assert "succeeded" in inside.run("glidefs handoff")
        guest(sockets, "read -P 7 0 1M")
    finally:
        inside.end_all()


@pytest.mark.parametrize(("release", "python"), [("bookworm", "3.11"), ("trixie", "3.13")])
def test_the_debian_package_serves_on_a_fresh_debian(release: str, python: str, tmp_path: Path) -> None:
    package = built(tmp_path / "made", "deb", "--python", python)
    with fresh_root(tmp_path / "root", release) as root:
        inside = Inside(root)
        shutil.copy(package, root / "tmp/glidefs.deb")
        inside.apt_install("/tmp/glidefs.deb")
        inside.run("/usr/lib/glidefs/bin/python3 -c 'import glidefs.tracing.otlp'")
        check_it_serves(inside)
        for name in ("bash-completion/completions/glidefs", "man/man1/glidefs-list.1.gz"):
            assert (root / "usr/share" / name).exists(), name
        unit = (root / "usr/lib/systemd/system/glidefs.service").read_text()
        assert "ExecStart=/usr/bin/glidefs run -c /etc/glidefs/glidefs.toml" in unit
        inside.run("dpkg --purge glidefs")
        assert not (root / "usr/bin/glidefs").exists()
        assert (root / "var/lib/glidefs/store").is_dir()  # data is nobody's to delete


@pytest.mark.skipif(bool(systemd_rig.missing()), reason=f"no systemd: {systemd_rig.missing()}")
def test_an_upgrade_hands_over_under_systemd(tmp_path: Path) -> None:
    """A client that stays connected notices nothing; removing the package ends the daemon."""
    package = built(tmp_path / "made", "deb", "--python", "3.11")
    drop_in = tmp_path / "units/glidefs.service.d/log.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nStandardError=append:/var/log/glidefs.log\n")
    with fresh_root(tmp_path / "root", "bookworm") as root:
        inside = Inside(root)
        shutil.copy(package, root / "tmp/glidefs.deb")
        inside.apt_install("/tmp/glidefs.deb systemd")
        with systemd_rig.systemd(tmp_path, tmp_path / "units", root) as manager:

            def run(command: str) -> str:
                done = manager.run("sh", "-c", command)
                assert done.returncode == 0, (
                    f"{command}: {done.stdout}{done.stderr}{manager.console.read_text()}"
                )
                return done.stdout

            run("mkdir /var/lib/glidefs/store")
            run("systemctl enable --now glidefs.service")
            run("glidefs create vm1 --size 64MiB --transport nbd")
            before = manager.main_pid("glidefs.service")
            sockets = Path(f"/proc/{manager.pid}/root/run/glidefs")
            stays = subprocess.Popen(
                ["qemu-io", "-f", "raw", f"nbd+unix:///vm1?socket={sockets}/nbd.sock"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert stays.stdin is not None
            stays.stdin.write("write -P 7 0 1M\nflush\n")
            stays.stdin.flush()
            said = run("dpkg --install /tmp/glidefs.deb 2>&1")
            assert "failed" not in said, said
            wait_for(lambda: manager.main_pid("glidefs.service") not in (0, before), "another main process")
            assert manager.show("glidefs.service", "NRestarts") == "0"
            told = stays.communicate("read -P 7 0 1M\nwrite -P 8 1M 1M\n", timeout=60)[0]
            assert told.count("wrote 1048576/1048576") == 2, told
            assert "read 1048576/1048576" in told, told
            guest(sockets, "read -P 8 1M 1M")
            run("dpkg --remove glidefs")
            assert manager.main_pid("glidefs.service") == 0


def test_the_wheel_needs_no_compiler(tmp_path: Path) -> None:
    wheel = built(tmp_path / "made", "wheel")
    assert "-cp311-abi3-manylinux" in wheel.name
    with fresh_root(tmp_path / "root", "bookworm") as root:
        inside = Inside(root)
        kept = str(root / "tmp")
        get = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--only-binary",
            ":all:",
            "-d",
            kept,
            str(wheel),
        ]
        subprocess.run(get, check=True)
        inside.apt_install("python3-venv")
        inside.run("python3 -m venv /opt/g")
        inside.run(f"/opt/g/bin/pip install -q --no-index -f /tmp /tmp/{wheel.name}")
        inside.run("! command -v gcc && ln -s /opt/g/bin/glidefs /usr/bin/")
        inside.run("mkdir -p /etc/glidefs && glidefs init /etc/glidefs/glidefs.toml")
        check_it_serves(inside)


@contextlib.contextmanager
def checkout(path: Path, release: str) -> Iterator[Inside]:
    """A root with nothing but Debian and this tree, in /glidefs."""
    if not LONG:
        pytest.skip("takes minutes: runs with GLIDEFS_TEST_LENGTH=long")
    if os.geteuid() or not shutil.which("debootstrap"):
        pytest.skip("needs root and debootstrap")
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    with fresh_root(path, release) as root:
        for name in kept.stdout.splitlines():
            (root / "glidefs" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / "glidefs" / name)
        inside = Inside(root)
        try:
            yield inside
        finally:
            inside.end_all()


@pytest.mark.parametrize("release", ["bookworm", "trixie"])
def test_by_hand_works_as_the_readme_says(release: str, tmp_path: Path) -> None:
    """The marked blocks of README's "By hand", one shell, on a root with nothing installed."""
    blocks = [b for b in blocks_of((ROOT / "README.md").read_text()) if b.place == "fresh root"]
    assert len(blocks) == 2
    with checkout(tmp_path / "root", release) as inside:
        script = inside.root / "tmp/by-hand"
        script.write_text("set -eu\ncd /glidefs\n" + "\n".join(block.code for block in blocks))
        # To a file: the daemon that it starts would keep a pipe open.
        told = inside.run("bash /tmp/by-hand >/tmp/told 2>&1 || { cat /tmp/told; exit 1; }; cat /tmp/told")
        assert "vm2: drained" in told


def test_the_quick_tests_pass_on_the_next_debian(tmp_path: Path) -> None:
    """As a contributor there would run them; its Python is 3.13."""
    with checkout(tmp_path / "root", "trixie") as inside:
        said = inside.run("cd /glidefs && scripts/test --quick --only pytest", timeout=3600)
        assert " passed" in said
        assert "Python 3.13" in said
