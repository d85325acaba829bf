"""The hostile driver of `vhost_fuzz.c`, under ASan and UBSan."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from core_rig import SANITIZED

from glidefs.core.build import LIBRARIES, sources

ROOT = Path(__file__).resolve().parents[2]
QUICK = os.environ.get("GLIDEFS_TEST_LENGTH") == "quick"
SECONDS = int(os.environ.get("GLIDEFS_FUZZ_SECONDS", "4" if QUICK else "30"))
FLAGS = "-std=gnu11 -D_GNU_SOURCE -O1 -g -Wall -Wextra -Werror -fno-strict-aliasing -pthread -Icsrc"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"


@pytest.mark.skipif(SANITIZED, reason="it has sanitizers of its own")
@pytest.mark.timeout(300 + SECONDS)
def test_a_hostile_driver(tmp_path: Path) -> None:
    program = tmp_path / "vhost_fuzz"
    files = ["tests/vhost/vhost_fuzz.c", *sources()]
    libraries = [f"-l{name}" for name in LIBRARIES]
    command = ["cc", *FLAGS.split(), *SANITIZERS.split(), "-o", str(program), *files, *libraries]
    subprocess.run(command, cwd=ROOT, check=True)
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
