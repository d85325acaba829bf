"""The application: from a request to the handler of its route, and from an error to its answer."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from glidefs.api.access import Caller, Scope, caller_of
from glidefs.api.audit import Audit, Record
from glidefs.api.errors import (
    MEDIA_TYPE,
    URN,
    BadRequest,
    BodyTooLarge,
    NoSuchPath,
    Problem,
    WrongMethod,
    headers_of,
    problem_of,
)
from glidefs.api.handlers import Call, Control, Handlers
from glidefs.api.openapi import document
from glidefs.api.pages import ui_files
from glidefs.api.routes import EXPORT, MAX_BODY, ROUTES, Route
from glidefs.asked import Asker, asked_by

MAX_PATH = 400
"""Characters of a path in what is said about a request."""
TRACE = ("traceparent", "tracestate")
"""Header fields of W3C Trace Context: what a request is a part of elsewhere."""
Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(control: Control, audit: Audit) -> Starlette:
    """The application."""
    app = Starlette()
    app.router.redirect_slashes = False
    handlers = Handlers(control, lambda: msgspec.json.encode(document(ROUTES)))
    places: dict[str, dict[str, Route]] = {}
    for route in ROUTES:
        for place in route.places:
            places.setdefault(place, {})[route.method] = route
    for place, routes in places.items():
        app.router.add_route(place, _endpoint(routes, handlers, audit), methods=list(routes))
    for place, send in ui_files():
        app.router.add_route(place, send, methods=["GET"])
    for status in (404, 405):
        app.add_exception_handler(status, _no_route)
    return app


def _endpoint(routes: Mapping[str, Route], handlers: Handlers, audit: Audit) -> Endpoint:
    """What answers all methods of one path."""

    async def answer(request: Request) -> Response:
        method = request.method
        route = routes.get("GET" if method == "HEAD" and "HEAD" not in routes else method)
        assert route is not None  # the router knows the methods
        done = _Done()
        try:
            return await _answer(route, handlers, request, done)
        finally:
            if route.changes:
                handlers.scrape.changed()  # the next one shows what a verb did, even if it failed half-way
                await audit.note(done.record(route, request))

    return answer


class _Done:
    """What became of a request, for the audit."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.wanted: Any = None
        self.status = 500
        self.reason = ""
        self.problem = ""

    def record(self, route: Route, request: Request) -> Record:
        """What the audit keeps of it."""
        return Record(
            caller=caller_of(request.scope),
            method=request.method,
            path=request.scope["path"][:MAX_PATH],
            verb=route.verb,
            status=self.status,
            seconds=time.monotonic() - self.began,
            wanted=self.wanted,
            reason=self.reason,
            problem=self.problem,
            export=request.path_params["name"][:MAX_PATH] if route.path.startswith(EXPORT) else "",
            headers={name: request.headers[name] for name in TRACE if name in request.headers},
        )


async def _answer(route: Route, handlers: Handlers, request: Request, done: _Done) -> Response:
    caller = caller_of(request.scope)
    try:
        caller.check(route.scope, route.verb)
        done.wanted = await _wanted(route, request)
        _check_options(route, caller, done.wanted)
        with asked_by(Asker(caller.who)):
            response = await route.handler(handlers, Call(request), done.wanted)
    except Exception as error:
        problem, response = _refusal(request, error)
        done.reason, done.problem = problem.error, problem.type.removeprefix(URN)
    done.status = response.status_code
    return response


async def _wanted(route: Route, request: Request) -> Any:
    """What a request carries, as the struct of its route; an absent body is an empty object.

    Raises BadRequest, BodyTooLarge.
    """
    if route.takes is None:
        return None
    try:
        if not route.has_body:
            return msgspec.convert(dict(request.query_params), route.takes, strict=False)
        return msgspec.json.decode(await _body(request) or b"{}", type=route.takes)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        part = "request body" if route.has_body else "query"
        raise BadRequest(f"{part}: {error}") from error


async def _body(request: Request) -> bytes:
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > MAX_BODY:
                raise BodyTooLarge(f"the request body has more than {MAX_BODY} bytes")
    except ClientDisconnect:
        raise BadRequest("the request body ended before its end") from None
    return bytes(data)


def _check_options(route: Route, caller: Caller, wanted: Any) -> None:
    """Some options of a verb take more than the verb. Raises Forbidden."""
    for option in route.admin:
        if getattr(wanted, option):
            caller.check(Scope.ADMIN, f"{route.verb} with {option}")


def _refusal(request: Request, error: Exception) -> tuple[Problem, Response]:
    problem = problem_of(error, request.scope["path"][:MAX_PATH])
    body = msgspec.json.encode(problem)
    return problem, Response(body, problem.status, headers=headers_of(error), media_type=MEDIA_TYPE)


async def _no_route(request: Request, error: Exception) -> Response:
    """Where no route is: no such path, or not with this method."""
    what = f"{request.method} {request.scope['path'][:MAX_PATH]}"
    if getattr(error, "status_code", 404) == 404:
        found: Exception = NoSuchPath(f"{what}: no such path in the API; /docs has those there are")
    else:
        allowed = (getattr(error, "headers", None) or {}).get("Allow", "")
        found = WrongMethod(f"{what}: the path does not take this method", allowed)
    return _refusal(request, found)[1]
