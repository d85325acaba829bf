"""Nothing is out of sight: prefixes, records and logs that nobody serves are named; looking makes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import servers
from daemon_harness import Daemon

from glidefs.api.client import CommandError, export_path

pytest.importorskip("glidefs.core._core")
pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")

Make = Callable[..., Daemon]


def tree(*roots: Path) -> dict[str, tuple[int, int, bytes]]:
    """All below: mode, time of the last change, content."""
    found = {}
    for root in roots:
        for path in (root, *root.rglob("*")):
            status = path.lstat()
            data = path.read_bytes() if path.is_file() else b""
            found[str(path)] = (status.st_mode, status.st_mtime_ns, data)
    return found


def checks(daemon: Daemon) -> dict[str, dict[str, str]]:
    report = json.loads(daemon.run("doctor", "--json", check=False).stdout)
    return {check["check"]: check for check in report["checks"]}


def test_doctor_makes_nothing(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon()
    daemon.store.rmdir()
    before = tree(tmp_path)
    found = checks(daemon)
    assert tree(tmp_path) == before  # neither a store nor a cache directory
    assert found["store"]["state"] == "fail"
    assert "is not there" in found["store"]["detail"]
    assert "--init-store" in found["store"]["remedy"]
    daemon.store.mkdir()
    daemon.start()
    daemon.json("create", "v1", "--size", "16MiB", "--wait")
    daemon.io("v1", "write -P 1 0 1M")
    daemon.stop()
    before = tree(tmp_path)
    assert checks(daemon)["store"]["state"] == "ok"
    assert tree(tmp_path) == before


def test_doctor_leaves_nothing_in_a_bucket(make_daemon: Make) -> None:
    daemon = make_daemon()
    with servers.moto() as endpoint:
        daemon.endpoint = endpoint
        daemon.write_config()
        servers.make_bucket(endpoint, "bucket")
        client = servers.s3_client(endpoint)
        client.put_object(Bucket="bucket", Key="root/else/volumes/v/manifest", Body=b"x")
        before = tree(daemon.base)
        found = checks(daemon)
        assert found["store"]["state"] == "ok"
        assert "else" in found["store prefixes"]["detail"]
        assert tree(daemon.base) == before
        objects = client.list_objects_v2(Bucket="bucket")["Contents"]
        assert [each["Key"] for each in objects] == ["root/else/volumes/v/manifest"]


def test_a_prefix_is_made_on_purpose_only(daemon: Daemon, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 4096)
    assert "--new-prefix" in daemon.fails("create", "v1", "--size", "16MiB", "--prefix", "slip")
    assert "--new-prefix" in daemon.fails("bless", str(image), "-n", "b", "--prefix", "slip")
    with pytest.raises(CommandError, match="does not name slip"):
        daemon.client.call("POST", "/api/bases/b", {"image": str(image), "prefix": "slip"})
    assert not (daemon.store / "slip").exists()
    assert daemon.json("list") == []
    daemon.json("create", "v1", "--size", "16MiB", "--prefix", "meant", "--new-prefix", "--wait")
    daemon.client.call("PUT", export_path("v1"), {"size": "16MiB", "prefix": "meant"})  # there already
    daemon.json("bless", str(image), "-n", "b", "--prefix", "meant", "--new-prefix")


def test_prefixes_that_nobody_names_are_said(daemon: Daemon) -> None:
    (daemon.store / "lost+found").mkdir()
    (daemon.store / "photos" / "2026").mkdir(parents=True)
    assert checks(daemon)["store prefixes"]["state"] == "ok"
    daemon.json("create", "v1", "--size", "16MiB", "--prefix", "other", "--new-prefix", "--wait")
    line = checks(daemon)["store prefixes"]
    assert line["state"] == "warn"
    assert line["detail"].endswith(": other")
    assert "[store] prefixes" in line["remedy"]
    assert daemon.json("gc", "--dry-run")["unnamed_prefixes"] == ["other"]
    assert "other" in daemon.run("gc", "--dry-run").stderr


def test_what_nobody_serves_is_named_with_its_verb(daemon: Daemon, make_daemon: Make) -> None:
    for name in ("v1", "v2"):
        daemon.json("create", name, "--size", "16MiB", "--wait")
        daemon.io(name, "write -P 1 0 1M")
    found = checks(daemon)
    assert (found["exports"]["state"], found["write logs"]["state"]) == ("ok", "ok")
    daemon.stop()
    line = checks(daemon)["exports"]
    assert line["detail"] == "2 are recorded and no daemon serves them"
    assert "glidefs run" in line["remedy"]
    exports = daemon.base / "cache" / "exports"
    (exports / "v1.json").write_text("{}")
    (exports / "v2.json").unlink()
    found = checks(daemon)
    assert found["exports"]["detail"] == "damaged records: v1"
    assert "glidefs remove" in found["exports"]["remedy"]
    assert found["write logs"]["detail"].startswith("2 of lost records")
    assert "glidefs attach" in found["write logs"]["remedy"]
    assert "glidefs logs export" in found["write logs"]["remedy"]
