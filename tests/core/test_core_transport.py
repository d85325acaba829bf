"""The seam between a volume and its transports: a new one needs no change of the core."""

from __future__ import annotations

import subprocess
from pathlib import Path

from core_archive import ROOT, link_command


def test_a_transport_of_its_own(tmp_path: Path) -> None:
    program = tmp_path / "null_transport"
    subprocess.run(link_command("asan", program, "tests/core/null_transport.c"), cwd=ROOT, check=True)
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
