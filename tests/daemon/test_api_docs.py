"""docs/api.md as written: every block is run in order, against a daemon that is set up as the text says.

Only the places differ: directories of the system are directories of the test, and the port is a free one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import servers
from api_rig import Certificates, Door, configure
from daemon_harness import ROOT, Daemon
from waiting import DEADLINE

from glidefs.api.access import WORDS
from glidefs.api.errors import INTERNAL, KINDS

pytest.importorskip("glidefs.core._core")

TEXT = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SEEN = """\
until curl -sf -o seen --cacert etc/ca.crt -H "Authorization: Bearer $(cat ci.token)" https://localhost:8440/health
do sleep 0.05; done
"""
"""The daemon sees a new token within a second; a person who types the next line takes longer."""
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_every_problem_is_listed() -> None:
    rows = set(re.findall(r"^\| `([a-z-]+)` \| (\d+) \| (.*) \|$", TEXT, re.MULTILINE))
    assert rows == {(kind.name, str(kind.status), kind.title) for kind in [*(k for _, k in KINDS), INTERNAL]}


def test_every_scope_is_listed() -> None:
    assert re.findall(r"^\| `(\w+)` \| \D", TEXT, re.MULTILINE) == list(WORDS)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_examples_run(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon, port, home = make_daemon(), servers.free_port(), tmp_path / "home"
    home.mkdir()
    etc = daemon.base / "etc"
    etc.mkdir()
    _certificates(etc)
    here = {"/run/glidefs/": f"{daemon.base}/", "/etc/glidefs/": f"{etc}/", ":8440": f":{port}"}
    settings = next(block for kind, block in BLOCKS if kind == "toml")
    lines = _placed(settings.removeprefix("[api]\n"), here)
    assert set(tomllib.loads(lines)) == {"listen", "tokens_file", "tls_cert", "tls_key"}
    configure(daemon, "api", lines.replace("0.0.0.0", "127.0.0.1") + 'audit_log = "audit.jsonl"')
    (etc / "tokens.toml").touch(0o600)
    daemon.start()
    shells = [_placed(block, here) for kind, block in BLOCKS if kind == "sh"]
    script = "\n".join(
        f"{{\n{SEEN if '--cacert' in block else ''}{block}\n}} > {home}/{number}.out\n"
        for number, block in enumerate(shells)
    ).replace(":8440", f":{port}")
    (home / "etc").symlink_to(etc)
    program = home / "bin" / "glidefs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m glidefs "$@"\n')
    program.chmod(0o755)
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("GLIDEFS_", "XDG_"))
    }
    environment |= {
        "HOME": str(home),
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE * 3,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = [(home / f"{number}.out").read_text() for number in range(len(shells))]
    _check(daemon, home, shells, out)


def _certificates(etc: Path) -> None:
    """As the text names them."""
    made = Certificates(etc, "localhost")
    for path, name in ((made.ca, "ca.crt"), (made.cert, "api.crt"), (made.key, "api.key")):
        path.rename(etc / name)


def _placed(block: str, here: dict[str, str]) -> str:
    for written, meant in here.items():
        block = block.replace(written, meant)
    return block


def _check(daemon: Daemon, home: Path, shells: list[str], out: list[str]) -> None:
    """What the blocks printed, and what they left."""
    assert {export["name"] for export in daemon.json("list")} == {"vm1", "vm2"}
    assert daemon.json("show", "vm1")["size"] == 15 << 30
    assert "<!doctype html>" in (home / "glidefs-api.html").read_text()
    examples = [json.loads(block) for kind, block in BLOCKS if kind == "json"]
    (problem,) = (text for shell, text in zip(shells, out, strict=True) if shell == "api /v1/exports/vm9\n")
    assert json.loads(problem) == examples[0]
    (far,) = (text for shell, text in zip(shells, out, strict=True) if "--cacert" in shell)
    assert {export["name"] for export in json.loads(far)} == {"vm1", "vm2"}
    (listed,) = (text for shell, text in zip(shells, out, strict=True) if "context use prod" in shell)
    assert "vm1" in listed
    assert (home / "ci.token").stat().st_mode & 0o777 == 0o600
    door = Door(str(daemon.base / "api.sock"))
    door.ask("DELETE", "/v1/exports/none?purge=true")
    line = json.loads((daemon.base / "audit.jsonl").read_text().splitlines()[-1])
    assert line.keys() == examples[1].keys()
    assert {key: type(value) for key, value in line.items()} == {
        key: type(value) for key, value in examples[1].items()
    }
