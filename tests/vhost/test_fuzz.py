"""The hostile driver of `vhost_fuzz.c`, under ASan and UBSan."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from core_archive import ROOT, link_command
from core_rig import SANITIZED

QUICK = os.environ.get("GLIDEFS_TEST_LENGTH") == "quick"
SECONDS = int(os.environ.get("GLIDEFS_FUZZ_SECONDS", "4" if QUICK else "15"))


@pytest.mark.skipif(SANITIZED, reason="it has sanitizers of its own")
@pytest.mark.timeout(300 + SECONDS)
def test_a_hostile_driver(tmp_path: Path) -> None:
    program = tmp_path / "vhost_fuzz"
    subprocess.run(link_command("asan", program, "tests/vhost/vhost_fuzz.c"), cwd=ROOT, check=True)
    (tmp_path / "data").mkdir()
    seed = os.environ.get("GLIDEFS_FUZZ_SEED") or str(int.from_bytes(os.urandom(3), "little"))
    done = subprocess.run(
        [str(program), str(tmp_path / "data"), str(SECONDS), seed],
        env={**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"},
        capture_output=True,
        text=True,
        timeout=SECONDS + 120,
        check=False,
    )
    print(f"seed {seed}: {done.stdout}")
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    found = re.fullmatch(
        r"(\d+) descriptors, (\d+) devices, (\d+) of .* (\d+) rounds answered\n", done.stdout
    )
    assert found is not None
    made, devices, stopped, answered = map(int, found.groups())
    assert made > 1000
    assert 0 < stopped < devices
    assert answered
