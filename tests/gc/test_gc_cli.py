"""`glidefs gc` as it is typed."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import time
from pathlib import Path

import command_line
import gc_rig as rig
import pytest
from stored_roots import put_root

from glidefs import names
from glidefs.cli.main import gc as gc_verb
from glidefs.cli.offline import checked_grace
from glidefs.config import Config, StoreSettings
from glidefs.daemon.serving import host_settings
from glidefs.errors import ConfigError
from glidefs.gc.run import DEFAULT_LIMIT
from glidefs.offline.inspect import inspect as describe
from glidefs.offline.inspect import open_source
from glidefs.store import open_store

ROOT = Path(__file__).resolve().parents[2]


def gc(tmp: Path, *args: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GLIDEFS_")}
    config = tmp / "glidefs.toml"
    (tmp / "store").mkdir(exist_ok=True)
    config.write_text(f'[store]\nurl = "file://{tmp}/store"\nprefixes = ["p", "q"]\ngc_grace = "2h"\n')
    environment = {**clean, "PYTHONPATH": str(ROOT)}
    return command_line.run(["gc", "-c", str(config), *args], cwd=tmp, env=environment, timeout=60)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    with open_store(f"file://{tmp_path}/store", create=True) as store:
        rig.put_volume(store, "v", [rig.put_pack(store)])
        rig.put_pack(store, 5000)
        put_root(store, names.manifest_key("q", "w"), rig.inline_root("w", []))
    for pack in (tmp_path / "store" / "p" / "packs").rglob("??????*"):
        os.utime(pack, (time.time() - 86400,) * 2)
    return tmp_path


def test_one_document_for_all_prefixes(filled: Path) -> None:
    done = gc(filled, "--json")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["prefixes"]
    assert (first["prefix"], second["prefix"]) == ("p", "q")
    assert first["grace"] == 7200
    assert first["listed"] == {"objects": 2, "bytes": 5100}
    assert first["waiting"] == {"objects": 1, "bytes": 5000}
    assert second["roots"] == 1


def test_lines_for_people(filled: Path) -> None:
    gc(filled)
    done = gc(filled, "--prefix", "p", "--grace", "0", "--force", "--dry-run")
    assert "due           1 objects, 4.9KiB (dry run" in done.stdout
    done = gc(filled, "--prefix", "p", "--grace", "0", "--force")
    assert "deleted       1 objects, 4.9KiB" in done.stdout
    assert "q:" not in done.stdout


def test_a_short_grace_needs_force(filled: Path) -> None:
    done = gc(filled, "--grace", "1h")
    assert done.returncode == 1
    assert "gc_grace" in done.stderr
    assert "--force" in done.stderr
    assert not (filled / "store" / "p" / "gc").exists()


def test_a_broken_prefix_does_not_stop_the_others(filled: Path) -> None:
    with open_store(f"file://{filled}/store") as store:
        store.put(names.tag_key("p", "t"), b"damaged")
    done = gc(filled, "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert "p/tags/t" in document["error"]
    assert "p/tags/t" in document["prefixes"][0]["error"]
    assert document["prefixes"][1]["roots"] == 1
    assert done.stderr.count("\n") == 1


def test_grace_and_configuration() -> None:
    assert checked_grace(None, 100.0, False) == 100.0
    assert checked_grace(100.0, 100.0, False) == 100.0
    assert checked_grace(200.0, 100.0, False) == 200.0
    assert checked_grace(99.0, 100.0, True) == 99.0
    with pytest.raises(ConfigError, match="--force"):
        checked_grace(99.0, 100.0, False)


def test_hosts_and_gc_have_one_grace() -> None:
    config = Config(store=StoreSettings(gc_grace=7200.0))
    assert host_settings(config).gc_grace == 7200.0
    assert host_settings(Config()).gc_grace == Config().store.gc_grace


def test_limit_of_a_run() -> None:
    assert inspect.signature(gc_verb).parameters["limit"].default == DEFAULT_LIMIT


def test_inspect_prints_a_state(filled: Path) -> None:
    gc(filled)
    with open_store(f"file://{filled}/store") as store:
        found = describe(open_source(store, names.gc_state_key("p")))
    assert (found["kind"], found["unreferenced_packs"], found["checkpoints"]) == ("gc state", 1, [])
