"""Any request to the API is carried out, or refused by a problem that its operation declares; never a 500.

Requests are made from the OpenAPI document as clients get it: right ones, near misses, and nonsense. The
daemon is real, its store a directory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from api_rig import Answer, configure, local
from daemon_harness import Daemon
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("glidefs.core._core")

LENGTH = os.environ.get("GLIDEFS_TEST_LENGTH", "normal")
REQUESTS = {"quick": 50, "long": 3000}.get(LENGTH, 200)
NAMES = ("v1", "v2", "b1", "default", "golden", "-x", "..", "%2e%2e", "a" * 129, "\0", "é", "1", "0" * 21, "")
TEXTS = (*NAMES, "10GiB", "+1MiB", "-1MiB", "1", "1e9", "base:b1", "volume:v1", "snapshot:v1@1", "tag:golden")
GOOD: dict[str, tuple[Any, ...]] = {
    "name": ("v1", "v1", "v2", "v3", "b1", "golden"),
    "sequence": ("1", "2", "3"),
    "prefix": ("default",),
    "size": ("16MiB", "32MiB", "+1MiB", 1 << 24, 1 << 25),
    "source": ("base:b1", "volume:v1", "snapshot:v1@1", "tag:golden", None),
    "transport": ("nbd", "vhost-user", "auto"),
    "tag": ("golden", "silver", None),
    "base": ("b2", "b1", None),
}
"""Values of fields, and of places in a path, that mean something here."""
LEFT_OUT = {"/v1/handoff"}
"""Its dry runs are tests of their own; here each would take a second."""

texts = st.one_of(st.sampled_from(TEXTS), st.text(max_size=12))
Draw = Callable[..., Any]
rarely = st.sampled_from((False,) * 7 + (True,))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)


def mostly(good: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What means something, and once in a while something else."""
    return rarely.flatmap(lambda other_one: other if other_one else good)


def of_schema(schema: dict[str, Any], where: Path) -> st.SearchStrategy[Any]:
    """Values that a schema allows, mostly."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([of_schema(one, where) for one in schema["anyOf"]])
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": st.integers(-2, 1 << 62) | st.sampled_from((0, 1, 2, 4096, 1 << 20)),
        # A wait of more than a moment shows nothing that a short one does not.
        "number": st.floats(0, 0.2) | st.just(-1.0),
        "string": texts | st.sampled_from([str(where / "image"), str(where / "out" / "file"), str(where)]),
    }
    return kinds.get(schema.get("type", ""), anything)


def bodies(schema: dict[str, Any], where: Path) -> st.SearchStrategy[Any]:
    """Bodies as the schema wants them; without some fields, with others; and what is no object at all."""
    fields = {
        name: st.sampled_from(GOOD[name]) if name in GOOD else of_schema(field, where)
        for name, field in schema["properties"].items()
    }
    needed = set(schema.get("required", ()))
    right = st.fixed_dictionaries(
        {name: fields[name] for name in needed},
        optional={name: one for name, one in fields.items() if name not in needed},
    )
    loose = {name: of_schema(field, where) | anything for name, field in schema["properties"].items()}
    bent = st.fixed_dictionaries({}, optional=loose)
    return mostly(right, st.one_of(bent, st.dictionaries(texts, anything, max_size=3), anything))


Request = tuple[str, str, str, Any, bytes | None]
"""Method, template of the path, path with query, JSON body, raw body."""


@st.composite
def requests(draw: Draw, doc: dict[str, Any], template: str, method: str, where: Path) -> Request:
    """One of an operation, or nearly so."""
    operation = doc["paths"][template][method]
    path, pairs = template, []
    for parameter in operation["parameters"]:
        name, schema = parameter["name"], parameter["schema"]
        if parameter["in"] == "path":
            good = st.sampled_from(GOOD[name])
            value = draw(mostly(good, texts))
            path = path.replace("{" + name + "}", quote(value.encode(), safe=""))
        elif draw(st.booleans()):
            good = st.sampled_from(GOOD.get(name, ("true", "false")))
            value = draw(mostly(good, of_schema(schema, where) | texts))
            pairs.append(f"{name}={quote(str(value).encode())}")
    if draw(rarely):
        pairs.append(f"{quote(draw(texts).encode())}={quote(draw(texts).encode())}")
    if draw(rarely):
        method = draw(st.sampled_from(["get", "put", "post", "delete", "patch", "options", "head", "brew"]))
    path += "?" + "&".join(pairs) if pairs else ""
    if "requestBody" not in operation:
        return method.upper(), template, path, None, draw(st.binary(max_size=40)) if draw(rarely) else None
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    body = draw(bodies(doc["components"]["schemas"][schema["$ref"].rpartition("/")[2]], where))
    raw = draw(st.binary(max_size=40) | st.just(b"[" * 9000)) if draw(rarely) else None
    return method.upper(), template, path, body, raw


def check(doc: dict[str, Any], method: str, template: str, answer: Answer) -> None:
    """An answer is one that the operation declares."""
    assert answer.status not in (500, 501), answer.body
    operation = doc["paths"][template].get(method.lower())
    if (
        answer.status >= 400
        and method != "HEAD"
        and not (template == "/health/ready" and answer.status == 503)
    ):
        assert answer.problem["status"] == answer.status
    if operation is None:
        if method not in ("HEAD", "OPTIONS"):
            assert answer.status in (404, 405), (method, template, answer)
    elif answer.status not in (404, 405):  # another path, such as one without a name
        assert str(answer.status) in operation["responses"], (method, template, answer)


def test_any_request(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """All of a test run at one daemon, which is as well afterwards as before."""
    daemon = make_daemon(extra='[vhost_user]\ndir = "vhost"')
    configure(daemon, "store", 'connect_timeout = "2s"')
    daemon.start()
    (tmp_path / "image").write_bytes(os.urandom(1 << 18))
    daemon.run("bless", str(tmp_path / "image"), "-n", "b1")
    daemon.run("create", "v1", "--size", "16MiB", "--transport", "nbd")
    daemon.run("create", "v2", "--from", "base:b1", "--transport", "nbd")
    door = local(daemon)
    doc = door.ask("GET", "/openapi.json").json
    operations = [
        (path, method) for path in sorted(set(doc["paths"]) - LEFT_OUT) for method in doc["paths"][path]
    ]
    seen: Counter[int] = Counter()
    ids = door.ask("GET", "/v1/logs").json[0]
    GOOD.update(volume=(ids["volume_id"], "v1"), log=(ids["log_id"], "1"))

    @settings(
        max_examples=-(-REQUESTS // len(operations)),
        deadline=None,
        database=None,
        derandomize=LENGTH != "long",
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*(requests(doc, path, method, tmp_path) for path, method in operations)))
    def run(wanted: tuple[Request, ...]) -> None:
        for request in wanted:
            one(*request)

    def one(method: str, template: str, path: str, body: Any, raw: bytes | None) -> None:
        if template.endswith("/profile") and isinstance(body, dict) and body.get("stop_after") is None:
            body["stop_after"] = 0.1  # it may be left out, and then a profile lasts
        answer = door.ask(method, path, body, raw=raw)
        seen[answer.status] += 1
        check(doc, method, template, answer)
        if method == "DELETE" or template.endswith("/detach"):  # so that there is something to ask for
            door.ask("PUT", "/v1/exports/v1", {"size": "16MiB", "transport": "nbd"})
            door.ask("PUT", "/v1/exports/v2", {"source": "base:b1", "transport": "nbd"})

    run()
    assert {200, 400, 404, 405} <= seen.keys(), seen  # it is not all nonsense
    assert door.ask("GET", "/health").json["ready"] is True
    assert door.ask("PUT", "/v1/exports/last", {"size": "16MiB", "transport": "nbd"}).status == 201
    assert daemon.has("last", 0, "0", "1M")
    assert "Traceback" not in daemon.log_text
    assert "unexpected error" not in daemon.log_text
