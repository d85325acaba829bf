"""What people type all day: several names at once, chosen columns, tags, completion, and what errors say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_harness import Daemon
from waiting import wait_for

pytest.importorskip("glidefs.core._core")

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def names(daemon: Daemon) -> list[str]:
    return [export["name"] for export in daemon.json("list")]


def test_several_at_once(daemon: Daemon) -> None:
    made = daemon.json("create", "vm-{}", "--count", "3", "--size", "8MiB")
    assert [export["name"] for export in made["created"]] == ["vm-1", "vm-2", "vm-3"]
    assert made["failed"] == []
    daemon.run("create", "--name", "other", "--size", "8MiB")
    drained = daemon.run("drain", "vm-1", "other").stdout
    assert sorted(drained.splitlines()) == ["other: drained", "vm-1: drained"]
    assert len(daemon.json("drain", "--all")["drained"]) == 4
    one = daemon.json("drain", "other")
    assert one["name"] == "other"  # one name, one object, as ever
    daemon.run("detach", "vm-1", "vm-2")
    assert names(daemon) == ["other", "vm-3"]
    back = daemon.json("attach", "vm-2", "vm-1")
    assert [export["name"] for export in back["attached"]] == ["vm-2", "vm-1"]
    assert len(daemon.json("rm", "vm-1", "vm-2", "vm-1")["removed"]) == 2
    assert names(daemon) == ["other", "vm-3"]


def test_one_that_fails_keeps_no_other_from_it(daemon: Daemon) -> None:
    daemon.run("create", "a", "--size", "8MiB")
    done = daemon.run("drain", "a", "absent", check=False)
    assert done.returncode == 1
    assert done.stdout == "a: drained\n"
    assert done.stderr.startswith("absent: ")
    assert len(done.stderr.splitlines()) == 1
    told = daemon.run("drain", "a", "absent", "--json", check=False)
    assert told.returncode == 1
    assert '"failed": [{"name": "absent", "error": ' in told.stdout


def test_all_is_asked_for(daemon: Daemon) -> None:
    daemon.run("create", "a", "--size", "8MiB")
    assert "--all" in daemon.fails("drain")
    assert "--all" in daemon.fails("drain", "a", "--all")
    assert "--force" in daemon.fails("remove", "--all")
    assert names(daemon) == ["a"]
    daemon.run("remove", "--all", "--force")
    assert names(daemon) == []
    assert daemon.json("drain", "--all") == {"drained": [], "failed": []}


def test_what_there_is_to_say_is_said_once(daemon: Daemon) -> None:
    """Notes go to stderr beside a JSON document, too."""
    told = daemon.run("attach", "--all").stderr
    assert told == "nothing to attach: the store has no other volume of that node\n"
    daemon.run("create", "a", "--size", "8MiB")
    removed = daemon.run("remove", "a", "--json")
    note = json.loads(removed.stdout)["note"]
    assert note
    assert removed.stderr == f"note: {note}\n"


def test_names_with_numbers(daemon: Daemon) -> None:
    assert "{}" in daemon.fails("create", "vm", "--count", "2", "--size", "8MiB")
    assert "{}" in daemon.fails("create", "{}{}", "--count", "2", "--size", "8MiB")
    assert "--name" in daemon.fails("create", "--size", "8MiB")
    assert "--name" in daemon.fails("create", "a", "--name", "b", "--size", "8MiB")
    assert names(daemon) == []


def test_a_list_has_the_columns_that_were_chosen(daemon: Daemon) -> None:
    daemon.run("create", "vm-{}", "--count", "2", "--size", "8MiB", "--transport", "nbd")
    daemon.run("create", "db", "--size", "16MiB", "--transport", "nbd", "--wait")
    lines = daemon.run("list", "vm-*", "-o", "size,name,created,clients").stdout.splitlines()
    assert lines[0].split("\t") == ["SIZE", "NAME", "CREATED", "CLIENTS"]
    size, name, created, clients = lines[1].split("\t")
    assert (size, name, clients) == ("8MiB", "vm-1", "0")
    assert created.endswith("Z")
    assert len(lines) == 3
    assert [e["name"] for e in daemon.json("ls", "db")] == ["db"]
    assert daemon.json("list", "--state", "failed") == []
    assert len(daemon.json("list", "--state", "serving", "--transport", "nbd")) == 3
    assert "choose of name, size" in daemon.fails("list", "-o", "name,colour")
    assert "--json" in daemon.fails("list", "-o", "name", "--json")
    stored = daemon.run("list", "--store", "d?").stdout.splitlines()
    assert stored[0].startswith("NAME\tSIZE\tCREATED\tNODE")
    assert [line.split("\t")[0] for line in stored[1:]] == ["db"]


def test_a_list_that_watches_goes_on(daemon: Daemon, tmp_path: Path) -> None:
    daemon.run("create", "a", "--size", "8MiB")
    seen = tmp_path / "seen"
    with seen.open("wb") as out:
        watch = subprocess.Popen(
            [sys.executable, "-m", "glidefs", "list", "--watch", "-c", str(daemon.config)],
            stdout=out,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        )
        try:
            wait_for(lambda: "a\t8MiB" in seen.read_text(), "the first page")
            daemon.run("create", "b", "--size", "8MiB")
            wait_for(lambda: "b\t8MiB" in seen.read_text(), "the next page")
        finally:
            watch.terminate()
            watch.wait(20)


def test_tags_are_listed_and_deleted(daemon: Daemon) -> None:
    daemon.run("create", "a", "--size", "8MiB")
    daemon.run("tag", "a", "good")
    daemon.run("tag", "a", "better")
    found = daemon.json("tags")
    assert [(t["tag"], t["volume"], t["size"]) for t in found] == [
        ("better", "a", 8 * MIB),
        ("good", "a", 8 * MIB),
    ]
    assert daemon.run("tags").stdout.splitlines()[1].startswith("better\ta\t8MiB\t")
    daemon.run("create", "fork", "--from", "tag:good")
    assert daemon.run("tag", "--delete", "good").stdout == "tag:good: deleted\n"
    assert [t["tag"] for t in daemon.json("tags")] == ["better"]
    assert "glidefs tags" in daemon.fails("tag", "--delete", "good")
    assert "tag:good" in daemon.fails("create", "late", "--from", "tag:good")
    assert daemon.json("show", "fork")["state"] == "serving"
    assert "--delete" in daemon.fails("tag", "a")
    assert "alone" in daemon.fails("tag", "a", "--delete", "better")
    (copy,) = daemon.store.rglob("tags/better")
    copy.write_bytes(b"damaged")
    (damaged,) = daemon.json("tags")
    assert damaged["tag"] == "better"
    assert damaged["damaged"]


def test_sizes_that_count_from_the_present_one(daemon: Daemon) -> None:
    daemon.run("create", "a", "--size", "8MiB")
    assert daemon.json("resize", "a", "+8MiB")["size"] == 16 * MIB
    assert "'+16MiB' would add it" in daemon.json("resize", "a", "16MiB")["note"]
    assert "--shrink" in daemon.fails("resize", "a", "-4MiB")
    assert daemon.json("resize", "a", "-4MiB", "--shrink")["size"] == 12 * MIB
    assert "at least" in daemon.fails("resize", "a", "-12MiB", "--shrink")
    assert "no size that it could change" in daemon.fails("create", "b", "--size", "+1GiB")


def test_the_version_is_said(daemon: Daemon) -> None:
    for option in ("--version", "-V"):
        assert daemon.run(option).stdout.startswith("glidefs ")


WORDS = {
    ("dr",): {"drain"},
    ("drain", "v"): {"vm-1", "vm-2"},
    ("drain", "vm-1", "v"): {"vm-2"},
    ("show", "x"): set(),
    ("create", "n", "--from", "t"): {"tag:"},
    ("create", "n", "--from", "tag:"): {"tag:good"},
    ("create", "n", "--from", "volume:vm"): {"volume:vm-1", "volume:vm-2"},
    ("create", "n", "--from", "snapshot:vm-1"): {"snapshot:vm-1@"},
    ("create", "n", "--from", "snapshot:vm-1@"): {"snapshot:vm-1@1"},
    ("tag", "--delete", ""): {"good"},
}


@pytest.fixture(scope="module")
def _bash() -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")


@pytest.mark.usefixtures("_bash")
def test_bash_completes_commands_and_names(daemon: Daemon, tmp_path: Path) -> None:
    """Of a daemon that runs. What bash itself does with a line is done by bash."""
    daemon.run("create", "vm-{}", "--count", "2", "--size", "8MiB", "--wait")
    taken = daemon.json("snapshot", "vm-1", "--tag", "good")["sequence"]
    program = tmp_path / "glidefs"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m glidefs "$@"\n')
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GLIDEFS_CONFIG": str(daemon.config),
    }
    for words, expected in WORDS.items():
        quoted = " ".join(f"'{word}'" for word in ("glidefs", *words))
        asked = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _glidefs_completion glidefs"
        told = 'printf "%s\\n" "${COMPREPLY[@]}"'
        wanted = {word.replace("@1", f"@{taken}") for word in expected}
        for _ in range(3):  # what a daemon does not answer in two seconds is not offered
            done = subprocess.run(
                ["bash", "-c", f"source <(glidefs completion bash); {asked}; {told}"],
                capture_output=True,
                text=True,
                env=environment,
                timeout=60,
                check=True,
            )
            found = set(done.stdout.split())
            if found == wanted:
                break
        assert found == wanted, (words, done.stderr)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "glidefs", "completion", shell],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert "_GLIDEFS_COMPLETE" in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True)


def test_completion_without_a_daemon_offers_nothing(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "GLIDEFS_SOCKET": str(tmp_path / "absent"),
        "_GLIDEFS_COMPLETE": "complete_bash",
        "COMP_WORDS": "glidefs drain v",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        [sys.executable, "-m", "glidefs"], capture_output=True, text=True, env=environment, check=True
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")
