"""Does a test fail when the rule that it guards is broken? Not part of a test run.

    python tests/model/mutations.py [NAME...] [--list] [--keep]

Copies the tree, and for each mutation changes one place of it, builds, runs the named tests and
says whether they fail. Exits non-zero if a mutant survives or a change no longer applies.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutation import Mutation
from mutations_changed import CHANGED
from mutations_core import CORE
from mutations_durable import DURABLE
from mutations_limits import LIMITS
from mutations_offline import OFFLINE
from mutations_vhost import VHOST
from mutations_volume import VOLUME

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "sim"))
from mutations_sim import SIM  # noqa: E402

BUILD_ARGS = ["setup.py", "-q", "build_ext", "-i"]
BUILD_TIMEOUT = 600
TEST_TIMEOUT = 900
MUTATIONS = DURABLE + CORE + LIMITS + OFFLINE + VHOST + VOLUME + CHANGED + SIM


def run(mutation: Mutation, tree: Path, python: str) -> tuple[bool, str]:
    """Whether the tests fail as they should, and a word on how."""
    path = tree / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        return False, f"the old text occurs {text.count(mutation.old)} times in {mutation.file}"
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        built = subprocess.run(
            [python, *BUILD_ARGS], cwd=tree, capture_output=True, text=True, timeout=BUILD_TIMEOUT
        )
        if built.returncode:
            return False, "does not build: " + built.stderr[-300:]
        environment = dict(os.environ, PYTHONPATH=str(tree))
        command = [
            python,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "--timeout=120",
            *mutation.tests,
        ]
        try:
            tested = subprocess.run(
                command, cwd=tree, capture_output=True, text=True, env=environment, timeout=TEST_TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return True, "hangs"
        if tested.returncode == 0:
            return False, "SURVIVES"
        if tested.returncode == 1 or tested.returncode < 0:
            return True, "fails" if tested.returncode == 1 else "crashes"
        return False, f"pytest exits {tested.returncode}: {tested.stdout[-300:]}"
    finally:
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true", help="only list them")
    parser.add_argument("--keep", action="store_true", help="keep the copy of the tree")
    options = parser.parse_args()
    chosen = [one for one in MUTATIONS if not options.names or one.name in options.names]
    if options.list:
        for one in chosen:
            print(f"{one.name:55} {one.file:22} {' '.join(one.tests)}")
        return 0
    tree = Path(tempfile.mkdtemp(prefix="glidefs-mutations-"))
    for name in ("csrc", "glidefs", "tests", "setup.py", "pyproject.toml", "README.md"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, tree / name)
    bad = 0
    for one in chosen:
        started = time.monotonic()
        good, how = run(one, tree, sys.executable)
        bad += not good
        print(
            f"{'ok ' if good else 'BAD'} {one.name:55} {how} ({time.monotonic() - started:.0f} s)", flush=True
        )
    if not options.keep:
        shutil.rmtree(tree)
    print(f"{len(chosen) - bad} of {len(chosen)} mutants are found")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
