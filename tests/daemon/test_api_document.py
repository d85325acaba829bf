"""The OpenAPI document says what the API does: every route is in it, and every example works."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from api_rig import Answer, Door, local, place_of
from daemon_harness import Daemon
from openapi_spec_validator import validate
from starlette.applications import Starlette
from starlette.routing import Route as Mounted
from waiting import DEADLINE

from glidefs.api import pages
from glidefs.api.app import build_app
from glidefs.api.errors import KINDS, URN
from glidefs.api.openapi import document, one_of, statuses
from glidefs.api.routes import OLD_PREFIX, PREFIX, ROUTES, Route, Text

pytest.importorskip("glidefs.core._core")

BY_VERB = {route.verb: route for route in ROUTES}


def as_read() -> dict[str, Any]:
    """The document as a client gets it."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(document(ROUTES)))
    return found


def test_the_document_is_openapi() -> None:
    validate(as_read())  # type: ignore[arg-type]


def test_every_route_is_in_the_document_and_no_other() -> None:
    app = build_app(Mock(), Mock())
    assert isinstance(app, Starlette)
    mounted = {
        (method, route.path)
        for route in app.routes
        if isinstance(route, Mounted) and route.path not in pages.UI_PATHS
        for method in (route.methods or set())
    }
    written = {(method.upper(), path) for path, methods in as_read()["paths"].items() for method in methods}
    old = {(route.method, place) for route in ROUTES for place in route.places[1:]}
    # A GET answers HEAD, too, which goes without saying.
    assert {pair for pair in mounted - old if pair[0] != "HEAD"} | {
        pair for pair in written if pair[0] == "HEAD"
    } == written
    assert old <= mounted
    assert all(place.startswith((OLD_PREFIX, "/admin")) for _, place in old)
    assert len(BY_VERB) == len(ROUTES)


def test_what_people_and_programs_need_is_said() -> None:
    doc = as_read()
    names = [operation["operationId"] for each in doc["paths"].values() for operation in each.values()]
    assert len(set(names)) == len(names)
    for path, methods in doc["paths"].items():
        for method, operation in methods.items():
            where = f"{method} {path}"
            assert operation["summary"], where
            assert operation["summary"][0].isupper(), where
            assert "GET " not in operation["summary"], where
            for parameter in operation["parameters"]:
                assert parameter["description"], (where, parameter["name"])
            if "requestBody" in operation:
                assert operation["requestBody"]["content"]["application/json"]["example"], where
    for name, schema in doc["components"]["schemas"].items():
        assert schema.get("description"), name
        assert "Body of" not in schema["description"], name


def test_names_of_problems_are_unique() -> None:
    names = [kind.type for _, kind in KINDS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(re.escape(URN) + r"[a-z]+(-[a-z]+)*", name) for name in names)


class Story:
    """Runs the examples, each once, in an order in which each of them can work."""

    def __init__(self, daemon: Daemon, door: Door) -> None:
        self.daemon = daemon
        self.door = door
        self.told: list[str] = []

    def tell(self, verb: str, *, body: dict[str, Any] | None = None, **values: str) -> Any:
        """The example of ``verb``, with ``values`` in its path and ``body`` where this host differs."""
        route = BY_VERB[verb]
        wanted = route.example | (body or {})
        query = None if route.has_body or not wanted else wanted
        sent = wanted if route.has_body else None
        answer = self.door.ask(route.method, place_of(route, **values), sent, query=query)
        assert answer.status in route.success, (verb, answer.status, answer.body, self.daemon.log_text)
        self.told.append(verb)
        return _decoded(route, answer)


def _decoded(route: Route, answer: Answer) -> Any:
    """The answer, which must have the declared shape, and no field more."""
    if route.gives is None:
        assert not answer.body
        return None
    if isinstance(route.gives, Text):
        assert answer.headers["Content-Type"].startswith(route.gives.media_type)
        return answer.body.decode()
    assert answer.headers["Content-Type"] == "application/json"
    errors = []
    for kind in one_of(route.gives):
        try:
            msgspec.json.decode(answer.body, type=kind)
            return json.loads(answer.body)
        except msgspec.ValidationError as error:
            errors.append(str(error))
    raise AssertionError((route.verb, errors, answer.body))


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")
def test_every_example_works(daemon: Daemon, tmp_path: Path) -> None:
    story = Story(daemon, local(daemon))
    made = story.tell("create")
    assert made["size"] == 10 << 30
    daemon.io("vm1", "write -P 1 0 1M")
    for verb in ("list", "show", "transport", "drain", "tag", "tags", "volumes", "live", "live-of"):
        story.tell(verb)
    assert story.tell("resize")["size"] == 15 << 30
    sequence = story.tell("snapshot")["sequence"]
    assert [one["sequence"] for one in story.tell("snapshots")] == [sequence]
    story.tell("delete-snapshot", sequence=str(sequence))
    story.tell("promote")
    image = tmp_path / "debian-12.raw"
    image.write_bytes(os.urandom(1 << 20))
    story.tell("bless", body={"image": str(image)})
    assert {base["name"] for base in story.tell("bases")} == {"debian-12", "golden"}
    story.tell("remove")
    story.tell("undelete")
    story.tell("attach")
    story.tell("detach")
    daemon.run("remove", "vm1")
    daemon.run("create", "vm1", "--from", "base:debian-12")
    story.tell("has-base")
    story.tell("profile")
    story.tell("remove-base")
    story.tell("delete-tag")
    _tell_of_logs(story, tmp_path)
    for verb in ("handoff", "metrics", "health", "ready", "openapi", "docs"):
        story.tell(verb)
    assert sorted(story.told) == sorted(BY_VERB)


def _tell_of_logs(story: Story, directory: Path) -> None:
    daemon = story.daemon
    daemon.run("create", "aside", "--size", "16MiB", "--wait")
    daemon.io("aside", "write -P 3 0 1M")
    away = daemon.store.with_name("away")
    daemon.store.rename(away)
    try:
        daemon.run("detach", "aside", "--force", "--timeout", "100ms")
    finally:
        away.rename(daemon.store)
    (log,) = (log for log in story.tell("logs") if log["state"] == "set aside")
    ids = {"volume": log["volume_id"], "log": log["log_id"]}
    target = directory / "log.raw"
    assert story.tell("export-log", body={"path": str(target)}, **ids)["bytes"] == 1 << 20
    assert target.read_bytes()[: 1 << 20] == bytes([3]) * (1 << 20)
    route = BY_VERB["delete-log"]
    assert local(daemon).ask("DELETE", place_of(route, **ids)).problem["type"] == f"{URN}in-use"
    answer = local(daemon).ask("DELETE", place_of(route, **ids), query={"force": "true"})
    assert answer.status == 200
    _decoded(route, answer)
    story.told.append("delete-log")


def test_old_paths_answer_the_same(daemon: Daemon) -> None:
    door = local(daemon)
    daemon.run("create", "vm1", "--size", "16MiB")
    for path in ("/exports/vm1", "/exports/none", "/volumes", "/tags?prefix=../x", "/logs"):
        new, old = door.ask("GET", PREFIX + path), door.ask("GET", OLD_PREFIX + path)
        assert new.status == old.status
        ours = [
            {**answer.json, "instance": ""} if new.status >= 400 else answer.json for answer in (new, old)
        ]
        assert ours[0] == ours[1]
    assert door.ask("POST", "/admin/handoff", {"dry_run": True}).json["dry_run"] is True
    assert PREFIX in door.ask("GET", "/openapi.json").body.decode()
    assert "/admin" not in door.ask("GET", "/openapi.json").body.decode()
    assert daemon.run("logs", "list").returncode == 0


def test_the_page_needs_nothing_else(daemon: Daemon) -> None:
    door = local(daemon)
    page = door.ask("GET", "/docs")
    text = page.body.decode()
    inside = re.search(r'<script type="application/json" id="document">(.*?)</script>', text, re.DOTALL)
    assert inside is not None
    assert json.loads(inside[1]) == door.ask("GET", "/openapi.json").json
    outside = re.findall(r"(?:src|href)=[\"']?(?!#)[^\"'> ]*|\burl\([^)]*\)|@import|fetch\(|XMLHttp", text)
    assert [found for found in outside if "#" not in found] == []
    assert "'none'" in page.headers["Content-Security-Policy"]
    assert page.headers["Content-Security-Policy"] == pages.DOCS_HEADERS["Content-Security-Policy"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """From a file, without a network: each operation and each schema has its place."""
    page, doc = tmp_path / "api.html", as_read()
    page.write_bytes(pages.docs(msgspec.json.encode(doc)))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--dump-dom",
    ]
    done = subprocess.run(
        ["chromium", *flags, page.as_uri()], capture_output=True, text=True, timeout=DEADLINE * 2, check=True
    )
    shown = set(re.findall(r'<section id="([\w-]+)"', done.stdout))
    names = {one["operationId"] for methods in doc["paths"].values() for one in methods.values()}
    assert shown == names | {f"schema-{name}" for name in doc["components"]["schemas"]}
    assert "curl --unix-socket /run/glidefs/api.sock -X PUT http://glidefs/v1/exports/vm1" in done.stdout


def test_nothing_in_a_document_ends_the_script() -> None:
    assert b"</script><b>" not in pages.docs(b'{"title": "</script><b>"}').split(b'id="document">')[1][:60]


WRONG: tuple[tuple[str, str, Any, int, str], ...] = (
    ("GET", "/v1/nothing", None, 404, "no-such-path"),
    ("GET", "/v2/exports", None, 404, "no-such-path"),
    ("GET", "/v1/exports/none", None, 404, "unknown-name"),
    ("GET", "/v1/exports/%00", None, 400, "invalid-name"),
    ("PUT", "/v1/exports/-x", {"size": "1GiB"}, 400, "invalid-name"),
    ("PUT", "/v1/exports/vm1", {"size": "1GiX"}, 400, "invalid-request"),
    ("PUT", "/v1/exports/vm1", {"sise": 1}, 400, "bad-request"),
    ("PUT", "/v1/exports/vm1", {"size": "9" * (1 << 17)}, 413, "body-too-large"),
    ("DELETE", "/v1/exports/none?purg=1", None, 400, "bad-request"),
    ("DELETE", "/v1/exports/none?purge=maybe", None, 400, "bad-request"),
    ("DELETE", "/v1/exports/vm1/snapshots/last", None, 400, "bad-request"),
    ("PATCH", "/v1/exports/vm1", {}, 405, "wrong-method"),
    ("POST", "/v1/exports", {}, 405, "wrong-method"),
    ("POST", "/v1/bases/b", {"image": "/nonexistent/image"}, 400, "invalid-request"),
    ("POST", "/v1/bases/b", {"image": "image"}, 400, "invalid-request"),
)


def test_what_is_wrong_is_a_problem(daemon: Daemon) -> None:
    for method, path, body, status, kind in WRONG:
        answer = local(daemon).ask(method, path, body)
        assert (answer.status, answer.problem["type"]) == (status, URN + kind), (method, path, answer.body)
        assert answer.problem["instance"].startswith("/v")
        assert "\n" not in answer.problem["detail"]
        if status == 405:
            assert "GET" in answer.headers["Allow"]


def test_what_is_not_http_is_a_problem(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(daemon.base / "api.sock"))
        raw.settimeout(60)
        raw.sendall(b"\0\1\2 nonsense\r\n\r\n")
        text = b"".join(iter(lambda: raw.recv(1 << 16), b"")).decode()
    head, _, body = text.partition("\r\n\r\n")
    assert " 400 " in head.splitlines()[0]
    assert json.loads(body)["type"] == f"{URN}bad-request"


def test_declared_statuses_have_a_title() -> None:
    known = {kind.status for _, kind in KINDS}
    for route in ROUTES:
        assert set(statuses(route)) <= known, route.verb
