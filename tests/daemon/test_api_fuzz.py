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
LEFT_OUT = {"/v1/handoff"}
"""Its dry runs are tests of their own; here each would take a second."""

texts = st.one_of(st.sampled_from(TEXTS), st.text(max_size=12))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)


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
    fields = {name: of_schema(field, where) for name, field in schema["properties"].items()}
    needed = set(schema.get("required", ()))
    right = st.fixed_dictionaries(
        {name: fields[name] for name in needed},
        optional={name: one for name, one in fields.items() if name not in needed},
    )
    bent = st.fixed_dictionaries({}, optional={name: one | anything for name, one in fields.items()})
    return st.one_of(right, right, bent, st.dictionaries(texts, anything, max_size=3), anything)


@st.composite
def requests(
    draw: Callable[..., Any], doc: dict[str, Any], where: Path
) -> tuple[str, str, str, Any, bytes | None]:
    """Method, template of the path, path with query, JSON body, raw body."""
    template = draw(st.sampled_from(sorted(set(doc["paths"]) - LEFT_OUT)))
    method = draw(st.sampled_from(sorted(doc["paths"][template])))
    operation = doc["paths"][template][method]
    if draw(st.integers(0, 9)) == 0:
        method = draw(st.sampled_from(["get", "put", "post", "delete", "patch", "options", "head", "brew"]))
    path = template
    for parameter in operation["parameters"]:
        if parameter["in"] == "path":
            value = draw(st.sampled_from(("v1", "v2", "b1")) | texts)
            path = path.replace("{" + parameter["name"] + "}", quote(value.encode(), safe=""))
    pairs = []
    for parameter in operation["parameters"]:
        if parameter["in"] == "query" and draw(st.booleans()):
            value = draw(of_schema(parameter["schema"], where) | texts)
            pairs.append(f"{parameter['name']}={quote(str(value).encode())}")
    if draw(st.integers(0, 9)) == 0:
        pairs.append(f"{quote(draw(texts).encode())}={quote(draw(texts).encode())}")
    path += "?" + "&".join(pairs) if pairs else ""
    if "requestBody" not in operation:
        return method.upper(), template, path, None, draw(st.none() | st.binary(max_size=40))
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    body = draw(bodies(doc["components"]["schemas"][schema["$ref"].rpartition("/")[2]], where))
    raw = draw(st.none() | st.none() | st.none() | st.binary(max_size=40) | st.just(b"[" * 9000))
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
    daemon = make_daemon()
    configure(daemon, "store", 'connect_timeout = "2s"')
    daemon.start()
    (tmp_path / "image").write_bytes(os.urandom(1 << 18))
    daemon.run("bless", str(tmp_path / "image"), "-n", "b1")
    daemon.run("create", "v1", "--size", "16MiB", "--transport", "nbd")
    daemon.run("create", "v2", "--from", "base:b1", "--transport", "nbd")
    door = local(daemon)
    doc = door.ask("GET", "/openapi.json").json
    seen: Counter[int] = Counter()

    @settings(
        max_examples=REQUESTS,
        deadline=None,
        database=None,
        derandomize=LENGTH != "long",
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(requests(doc, tmp_path))
    def run(request: tuple[str, str, str, Any, bytes | None]) -> None:
        method, template, path, body, raw = request
        answer = door.ask(method, path, body, raw=raw)
        seen[answer.status] += 1
        check(doc, method, template, answer)
        if method == "DELETE" or template.endswith("/detach"):  # so that there is something to ask for
            door.ask("PUT", "/v1/exports/v1", {"size": "16MiB", "transport": "nbd"})
            door.ask("PUT", "/v1/exports/v2", {"source": "base:b1", "transport": "nbd"})

    run()
    print(seen)
    assert {200, 201, 400, 404, 405, 409} <= seen.keys(), seen  # it is not all nonsense
    assert door.ask("GET", "/health").json["ready"] is True
    assert door.ask("PUT", "/v1/exports/last", {"size": "16MiB", "transport": "nbd"}).status == 201
    assert daemon.has("last", 0, "0", "1M")
    assert "Traceback" not in daemon.log_text
    assert "unexpected error" not in daemon.log_text
