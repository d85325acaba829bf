"""The commands: bless, bases, and what inspect and export-image say of bases."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import INTERRUPTIBLE
from images_rig import noise, write_image

from glidefs.cli.offline import bless_command
from glidefs.formats.blessing import Blessing, PutPack, encode_blessing
from glidefs.formats.manifest import PackRef
from glidefs.formats.pack import BLOCK

ROOT = Path(__file__).resolve().parents[2]


class Cli:
    def __init__(self, directory: Path) -> None:
        self.cwd = directory
        self.config = directory / "g.toml"
        (directory / "store").mkdir(exist_ok=True)
        self.config.write_text(f'[store]\nurl = "file://{directory}/store"\nprefixes = ["p"]\n')

    def run(self, *args: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GLIDEFS_")}
        environment |= {"PYTHONPATH": str(ROOT), "GLIDEFS_CONFIG": str(self.config)}
        return subprocess.run(
            [sys.executable, "-m", "glidefs", *args],
            cwd=self.cwd,
            env=environment,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            check=False,
        )

    def json(self, *args: str, stdin: bytes | None = None) -> Any:
        done = self.run(*args, "--json", stdin=stdin)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def fails(self, *args: str, stdin: bytes | None = None) -> str:
        done = self.run(*args, stdin=stdin)
        assert done.returncode == 1
        assert done.stdout == b""
        lines = done.stderr.decode().splitlines()
        assert len(lines) == 1, lines
        return lines[0]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


def test_bless_and_what_follows(cli: Cli, tmp_path: Path) -> None:
    write_image(tmp_path / "image", 9 * BLOCK, {0: noise(1), 5 * BLOCK: noise(2)})
    made = cli.json("bless", "image", "--name", "b")
    assert (made["name"], made["prefix"], made["created"]) == ("b", "p", True)
    assert (made["size"], made["data_bytes"], made["packs"]) == (9 * BLOCK, 2 * BLOCK, 1)
    again = cli.run("bless", "image", "-n", "b")
    assert again.stdout == b"b: there already, with this content\n"
    (listed,) = cli.json("bases")
    assert (listed["name"], listed["removed_at"], listed["packs"]) == ("b", 0, 1)
    assert listed["manifest_hash"] == made["manifest_hash"]
    shown = cli.json("inspect", "p/bases/b/manifest")
    assert shown["kind"] == "manifest root"
    assert (shown["read_only"], shown["content_hash"]) == (True, made["content_hash"])
    removed = cli.json("bases", "remove", "b")
    assert removed["removed_at"] > 0
    assert cli.json("bases", "remove", "b") == removed
    assert cli.json("bases", "list", "--prefix", "p")[0]["removed_at"] == removed["removed_at"]
    exported = cli.run("export-image", "base:b", "copy")
    assert b"note: base:b was removed at" in exported.stderr
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "image").read_bytes()
    assert "was removed on" in cli.fails("bless", "image", "-n", "b")


def test_standard_input(cli: Cli, tmp_path: Path) -> None:
    done = cli.run("bless", "-", "-n", "b", stdin=noise(1, BLOCK + 100))
    assert b"note: 412 zero bytes were added" in done.stderr
    assert done.stdout.startswith(b"b: 128.5KiB, ")
    assert cli.json("bases", "--store", f"file://{tmp_path}/store")[0]["source"] == "image:standard input"


def test_one_line_of_reason(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(noise(1))
    (tmp_path / "other").write_bytes(noise(2))
    assert "absent: No such file" in cli.fails("bless", "absent", "-n", "b")
    assert "it is a directory" in cli.fails("bless", ".", "-n", "b")
    assert "nothing in it" in cli.fails("bless", "-", "-n", "b", stdin=b"")
    assert "character device" in cli.fails("bless", "-", "-n", "b")
    assert "invalid base name" in cli.fails("bless", "image", "-n", "../b")
    assert "invalid prefix name" in cli.fails("bless", "image", "-n", "b", "--prefix", "a/b")
    assert "no base of that name" in cli.fails("bases", "remove", "b")
    assert cli.json("bless", "image", "-n", "b")["created"]
    assert "other content" in cli.fails("bless", "other", "-n", "b")


def test_packs_may_be_half_as_old_as_the_configured_grace(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def instead(*args: object, **options: float) -> None:
        raise Seen(options["max_age"])

    monkeypatch.setattr("glidefs.bless.bless.bless", instead)
    monkeypatch.setattr("glidefs.core.heap.keep_large_buffers_apart", lambda: None)
    config = tmp_path / "short.toml"
    config.write_text(f'[store]\nurl = "file://{tmp_path}/store"\ngc_grace = "2h"\n')
    with pytest.raises(Seen, match="3600"):
        bless_command("image", "b", None, None, str(config), False)


def test_inspect_a_checkpoint(cli: Cli, tmp_path: Path) -> None:
    ref = PackRef(id=b"p" * 16, size=1000, index_length=100)
    checkpoint = Blessing(5, (PutPack(ref, 6), PutPack(ref, 7)))
    (tmp_path / "blessing").write_bytes(encode_blessing(checkpoint, "p/bases/b/blessing"))
    shown = cli.json("inspect", "blessing")
    assert shown["kind"] == "checkpoint of a bless"
    assert (shown["started_at"], shown["pack_count"], shown["pack_bytes"]) == (5, 2, 2000)
    assert shown["packs"][1] == {
        "id": (b"p" * 16).hex(),
        "size": 1000,
        "index_length": 100,
        "level": 0,
        "put_at": 7,
    }


def test_interrupted(cli: Cli, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLIDEFS_CONFIG": str(cli.config)}
    command = [*INTERRUPTIBLE, sys.executable, "-m", "glidefs"]
    command += ["bless", str(tmp_path / "fifo"), "-n", "b"]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    with (tmp_path / "fifo").open("wb") as fifo:  # returns once the child has opened it
        fifo.write(noise(1, 1000))
        fifo.flush()
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert errors == "glidefs: interrupted; the same command goes on where this one stopped\n"
