"""The OpenAPI document, made from the table of routes and the structs that requests and answers are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

import msgspec

from glidefs.api.access import Scope
from glidefs.api.errors import KINDS, MEDIA_TYPE, Problem
from glidefs.api.routes import MAX_BODY, VERSION, Route, Text

OPENAPI = "3.1.0"
REFERENCE = "#/components/schemas/{name}"
GROUPS = {
    "exports": "Volumes that this host serves, and the verbs on them.",
    "store": "What is in the store: volumes, tags, bases.",
    "host": "This host: write logs, the daemon's process, metrics.",
    "api": "The API itself.",
}
PATH = {
    "name": "Name of the export, volume, tag or base.",
    "sequence": "Number of the snapshot.",
    "prefix": "Prefix of the store.",
    "volume": "Volume id, as the list of logs shows it.",
    "log": "Log id, as the list of logs shows it.",
}
ABOUT = f"""\
The control plane of one GlideFS daemon. Sizes are bytes, or text such as "10GiB" where a request says so;
times are unix seconds, durations seconds. A request body has at most {MAX_BODY} bytes; unknown fields are
refused. Every answer that is not 2xx is a problem document (RFC 9457). Clients of the Unix socket may do
everything; over TCP each operation takes a token with its scope, which `x-scope` names, and the fields that
`x-admin` names take `admin`. Fields may be added to answers; a field that is there keeps its meaning as long
as the path begins with /v{VERSION}.
"""


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """The whole document, of plain objects."""
    routes = tuple(routes)
    types = _types(routes)
    schemas, components = msgspec.json.schema_components(types, ref_template=REFERENCE)
    schema_of = {id(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.place, {})[route.method.lower()] = _operation(route, schema_of, components)
    return {
        "openapi": OPENAPI,
        "info": {
            "title": "GlideFS",
            "version": VERSION,
            "description": " ".join(ABOUT.split()),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The daemon that has this document."}],
        "tags": [{"name": name, "description": text} for name, text in GROUPS.items()],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": _problems(routes, schema_of[id(Problem)]),
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "A token, over TCP."}
            },
        },
        "security": [{"token": []}],
    }


def _types(routes: Iterable[Route]) -> list[Any]:
    """Each type of a request or an answer, once."""
    found: dict[int, Any] = {id(Problem): Problem}
    for route in routes:
        for kind in (route.takes, *one_of(route.gives)):
            if kind is not None and not isinstance(kind, Text):
                found[id(kind)] = kind
    return list(found.values())


def one_of(gives: Any) -> tuple[Any, ...]:
    """The types that an answer may have."""
    return gives if isinstance(gives, tuple) else (gives,)


def operation_id(route: Route) -> str:
    """The name of an operation for programs that are made from the document."""
    return route.verb.replace("-", "_")


def _operation(route: Route, schema_of: Mapping[int, Any], components: Mapping[str, Any]) -> dict[str, Any]:
    summary, _, more = inspect.cleandoc(route.handler.__doc__ or "").partition("\n")
    operation: dict[str, Any] = {
        "operationId": operation_id(route),
        "summary": summary.rstrip("."),
        "description": " ".join(more.split()) or summary,
        "tags": [route.group],
        "x-scope": route.scope.word,
        "parameters": [*_path_parameters(route), *_query(route, components)],
        "responses": _responses(route, schema_of),
    }
    if route.admin:
        operation["x-admin"] = list(route.admin)
    if route.scope is Scope.NONE:
        operation["security"] = []
    if route.has_body:
        operation["requestBody"] = {
            "required": bool(_component(route.takes, components).get("required")),
            "content": {"application/json": {"schema": schema_of[id(route.takes)], "example": route.example}},
        }
    return operation


def _component(kind: Any, components: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = components[kind.__name__]
    return found


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": PATH[name],
            "schema": {"type": "string"},
            "example": route.at[name],
        }
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]


def _query(route: Route, components: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of a query as parameters."""
    if route.takes is None or route.has_body:
        return []
    found = []
    for name, field in _component(route.takes, components)["properties"].items():
        schema = {key: value for key, value in field.items() if key != "description"}
        described = {"description": field.get("description", "")}
        found.append({"name": name, "in": "query", "required": False, **described, "schema": schema})
    return found


def statuses(route: Route) -> list[int]:
    """Of every problem that an operation may answer with."""
    found = {*route.errors, 500}
    if route.scope is not Scope.NONE:
        found |= {401, 403}
    if route.takes is not None or route.at:
        found.add(400)
    if route.has_body:
        found.add(413)
    return sorted(found - set(route.success))


def _responses(route: Route, schema_of: Mapping[int, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for status in route.success:
        answer: dict[str, Any] = {"description": HTTPStatus(status).phrase}
        if isinstance(route.gives, Text):
            answer["content"] = {route.gives.media_type: {"schema": {"type": "string"}}}
        elif route.gives is not None:
            found_in = [schema_of[id(kind)] for kind in one_of(route.gives)]
            schema = found_in[0] if len(found_in) == 1 else {"anyOf": found_in}
            answer["content"] = {"application/json": {"schema": schema}}
        found[str(status)] = answer
    for status in statuses(route):
        if route.method == "HEAD":
            found[str(status)] = {"description": _titles(status)}
        else:
            found[str(status)] = {"$ref": f"#/components/responses/problem{status}"}
    return found


def _problems(routes: Iterable[Route], schema: Mapping[str, Any]) -> dict[str, Any]:
    """An answer for each status of a problem."""
    found = sorted({status for route in routes for status in statuses(route)})
    content = {MEDIA_TYPE: {"schema": schema}}
    return {f"problem{status}": {"description": _titles(status), "content": content} for status in found}


def _titles(status: int) -> str:
    titles = [kind.title for _, kind in KINDS if kind.status == status] or [HTTPStatus(status).phrase]
    return ". ".join(titles) + "."
