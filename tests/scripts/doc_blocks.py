"""The marked blocks of documents, and how they are run as they stand.

`<!-- run -->` before a block of sh: it runs, after those before it on the page, in one shell. What follows a
colon says where: a plain one needs neither root nor a device. `<!-- prints -->` before a block of text: what
the block before it prints ends with this.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^<!-- (run|prints)(?:: ([^>]*))? -->\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DEADLINE = 300.0


class Block(NamedTuple):
    """``place``: what follows the colon of its mark; ``prints``: the end of its output, or None."""

    code: str
    place: str
    prints: str | None


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page to run, in order."""
    found: list[Block] = []
    for kind, place, code in BLOCK.findall(text):
        if kind == "run":
            found.append(Block(code, place, None))
        else:
            found[-1] = found[-1]._replace(prints=code)
    return found


def missing(blocks: Sequence[Block], programs: Sequence[str]) -> list[str]:
    """Those of ``programs`` that the blocks name and this machine lacks."""
    code = "\n".join(block.code for block in blocks)
    path = f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"
    return [p for p in programs if re.search(rf"\b{p}\b", code) and shutil.which(p, path=path) is None]


def script_of(blocks: Sequence[Block], out: Path) -> str:
    """One script; what each block prints goes to a file of its number in ``out``."""
    parts = ["set -eu", "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"]
    for number, block in enumerate(blocks):
        parts.append(f"{{\n{block.code}\n}} > {shlex.quote(str(out / str(number)))}")
    return "\n".join(parts) + "\n"


def environment_of_this_tree(programs: Path) -> dict[str, str]:
    """For a shell to which `glidefs` is that of this tree; ``programs`` is made, a directory for it."""
    programs.mkdir()
    program = programs / "glidefs"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m glidefs "$@"\n')
    program.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GLIDEFS_")}
    path = f"{programs}:{os.environ.get('PATH', '')}"
    return environment | {"PATH": path, "PYTHONPATH": str(ROOT)}


def run_blocks(blocks: Sequence[Block]) -> list[str]:
    """Run them in an empty directory with a short path, with `glidefs` of this tree; what each printed.

    Fails with what the shell and the daemons said.
    """
    with tempfile.TemporaryDirectory(prefix="doc-") as name:
        base = Path(name)
        work, out = base / "work", base / "out"
        for directory in (work, out):
            directory.mkdir()
        environment = environment_of_this_tree(base / "bin")
        with (base / "err").open("wb") as errors:
            shell = subprocess.Popen(
                ["bash", "-c", script_of(blocks, out)],
                cwd=work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
            try:
                code: int | str = shell.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                code = f"not ended after {DEADLINE:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGKILL)  # the daemons too, if they are left
                shell.wait()
        printed = [_text(out / str(number)) for number in range(len(blocks))]
        logs = "".join(path.read_text()[-3000:] for path in sorted(work.glob("**/daemon.log")))
        said = _text(base / "err")
        assert code == 0, f"{code}: {said[-3000:]}\n{''.join(printed)[-3000:]}\n{logs}"
    for block, text in zip(blocks, printed, strict=True):
        assert block.prints is None or text.endswith(block.prints), f"{block.code}\nprinted:\n{text}"
    return printed


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
