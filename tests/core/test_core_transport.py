"""The seam between a volume and its transports: a new one needs no change of the core."""

from __future__ import annotations

import subprocess
from pathlib import Path

from glidefs.core.build import LIBRARIES, sources

ROOT = Path(__file__).resolve().parents[2]


def test_a_transport_of_its_own(tmp_path: Path) -> None:
    program = tmp_path / "null_transport"
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O0", "-Wall", "-Wextra", "-Werror", "-pthread", "-Icsrc"]
    files = ["tests/core/null_transport.c", *sources()]
    libraries = [f"-l{name}" for name in LIBRARIES]
    subprocess.run(["cc", *flags, "-o", str(program), *files, *libraries], cwd=ROOT, check=True)
    for name in ("log", "cache"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [str(program), str(tmp_path / "log" / "l"), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "served, frozen, let go\n"), done.stderr
