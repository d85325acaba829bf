"""The routes. Each one decodes, calls the router in a thread, and encodes; nothing is decided here.

A verb runs on the pool of what it waits for (see :mod:`glidefs.api.pools`), in the name of who asked for
it. What may wait without bound ends when the client is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response

from glidefs.api.errors import ErrorAnswer, describe
from glidefs.api.life import Lives
from glidefs.api.looking import looking_routes
from glidefs.api.peer import asked_from
from glidefs.api.pools import Pool, Pools
from glidefs.api.shared import Shared
from glidefs.asked import Asker, asked_by, asker
from glidefs.errors import ConfigError
from glidefs.exports.requests import (
    AttachRequest,
    BlessRequest,
    CreateRequest,
    DetachRequest,
    DrainRequest,
    ProfileRequest,
    PromoteRequest,
    ResizeRequest,
    SnapshotRequest,
    TagRequest,
    TransportRequest,
    UndeleteRequest,
)
from glidefs.exports.router import ExportRouter
from glidefs.handoff.predecessor import Outcome

MAX_BODY = 64 << 10

T = TypeVar("T", bound=msgspec.Struct)
Handler = Callable[[Request], Awaitable[Response]]


class LogExportRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /api/logs/{volume}/{log}/export: an absolute path on the daemon's host.

    `partial`: a damaged log is exported as far as it is whole.
    """

    path: str
    partial: bool = False


class HandoffRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /admin/handoff. `dry_run`: start a successor, see that it could take over, end it."""

    dry_run: bool = False


class Control(Protocol):
    """What the daemon offers to the API."""

    @property
    def router(self) -> ExportRouter:
        """The exports."""
        ...

    def hand_over(self, *, dry_run: bool = False) -> Outcome:
        """Give the exports to a new process. Raises HandoffFailed."""
        ...

    def health(self) -> dict[str, Any]:
        """State of the process; the key "ready" is a bool."""
        ...

    def metrics(self) -> bytes:
        """The Prometheus text."""
        ...

    def live(self) -> bytes:
        """What all exports do now, as JSON."""
        ...

    def live_of(self, name: str) -> bytes:
        """What one did in the last hour, as JSON. Raises UnknownExport."""
        ...


def reply(value: Any, status: int = 200) -> Response:
    """An answer in JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def body(request: Request, kind: type[T]) -> T:
    """The request's JSON body as `kind`; an absent body is an empty object. Raises ConfigError."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY:
            raise ConfigError(f"the request body has more than {MAX_BODY} bytes")
    try:
        return msgspec.json.decode(bytes(data) or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"request body: {error}") from error


def sequence_of(text: str) -> int:
    """A snapshot's number in a path. Raises ConfigError."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise ConfigError(f"{text[:40]!r} is not the sequence number of a snapshot")
    return int(text)


def is_set(request: Request, option: str) -> bool:
    """Whether an option of the query is on."""
    return request.query_params.get(option, "").lower() in ("1", "true", "yes")


class Routes:
    """The handlers."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self.pools = Pools()
        self.life = Lives(lambda: control.router.table)
        self.scrape = Shared(partial(self.pools.looks.run, control.metrics))

    async def change(self, pool: Pool, call: Callable[[], Any]) -> Any:
        """A call that changes something: refused while the daemon stops."""
        self.control.router.check_changes()
        return await pool.run(call)

    async def wait(self, request: Request, call: Callable[[], Any]) -> Any:
        """A call that may wait without bound. It learns when the client is gone, and ends then."""
        watch = asyncio.create_task(_hang_up(request, asker()))
        try:
            return await self.pools.waits.run(call)
        finally:
            watch.cancel()

    async def list(self, request: Request) -> Response:
        """GET /api/exports."""
        return reply(await self.pools.looks.run(self.control.router.listing))

    async def show(self, request: Request) -> Response:
        """GET /api/exports/{name}."""
        return reply(await self.pools.looks.run(self.control.router.show, request.path_params["name"]))

    async def create(self, request: Request) -> Response:
        """PUT /api/exports/{name}: 201 when created, 200 when it was there with the same settings."""
        wanted = await body(request, CreateRequest)
        verb, name = "fork" if wanted.source else "create", request.path_params["name"]
        create = self.life.verb(verb, name, self.control.router.create, name, wanted)
        if wanted.wait or wanted.read_only:
            status = await self.wait(request, create)
        else:
            pool = self.pools.local if wanted.source is None else self.pools.forks
            status = await pool.run(create)
        return reply(status, 201 if status.created else 200)

    async def remove(self, request: Request) -> Response:
        """DELETE /api/exports/{name}: 200 also when it is gone already."""
        options = {option: is_set(request, option) for option in ("purge", "force", "now")}
        name = request.path_params["name"]
        remove = self.life.verb("remove", name, self.control.router.remove, name, **options)
        return reply(await self.pools.stores.run(remove))

    async def undelete(self, request: Request) -> Response:
        """POST /api/exports/{name}/undelete."""
        wanted = await body(request, UndeleteRequest)
        name = request.path_params["name"]
        undelete = self.life.verb("undelete", name, self.control.router.undelete, name, wanted.prefix)
        return reply(await self.pools.stores.run(undelete))

    async def resize(self, request: Request) -> Response:
        """POST /api/exports/{name}/resize."""
        wanted = await body(request, ResizeRequest)
        name = request.path_params["name"]
        resize, router = partial(self.life.verb, "resize", name), self.control.router
        return reply(
            await self.pools.local.run(resize(router.resize, name, wanted.size, shrink=wanted.shrink))
        )

    async def transport(self, request: Request) -> Response:
        """POST /api/exports/{name}/transport."""
        wanted = await body(request, TransportRequest)
        name = request.path_params["name"]
        change = partial(self.control.router.change_transport, name, wanted.transport)
        return reply(await self.pools.local.run(self.life.verb("transport", name, change)))

    async def drain(self, request: Request) -> Response:
        """POST /api/exports/{name}/drain."""
        wanted = await body(request, DrainRequest)
        name = request.path_params["name"]
        return reply(
            await self.wait(
                request, self.life.verb("drain", name, self.control.router.drain, name, wanted.timeout)
            )
        )

    async def detach(self, request: Request) -> Response:
        """POST /api/exports/{name}/detach."""
        wanted = await body(request, DetachRequest)
        name = request.path_params["name"]
        detach = partial(self.control.router.detach, name, wanted.timeout, force=wanted.force)
        return reply(await self.wait(request, self.life.verb("detach", name, detach)))

    async def attach(self, request: Request) -> Response:
        """POST /api/exports/{name}/attach."""
        wanted = await body(request, AttachRequest)
        verb, name = "take-over" if wanted.take_over else "attach", request.path_params["name"]
        attach = self.life.verb(verb, name, self.control.router.attach, name, wanted)
        return reply(await self.pools.stores.run(attach))

    async def volumes(self, request: Request) -> Response:
        """GET /api/volumes: what the store has, whoever serves it."""
        volumes, prefix = self.control.router.stored_volumes, request.query_params.get("prefix")
        return reply(await self.pools.stores.run(volumes, prefix))

    # -- forks -------------------------------------------------------------------------------------

    async def snapshot(self, request: Request) -> Response:
        """POST /api/exports/{name}/snapshot: 201, as each call makes one."""
        wanted = await body(request, SnapshotRequest)
        name = request.path_params["name"]
        self.control.router.check_changes()
        snapshot = self.life.verb("snapshot", name, self.control.router.forks.snapshot, name, wanted)
        return reply(await self.wait(request, snapshot), 201)

    async def snapshots(self, request: Request) -> Response:
        """GET /api/exports/{name}/snapshots."""
        name, prefix = request.path_params["name"], request.query_params.get("prefix")
        return reply(await self.pools.stores.run(self.control.router.forks.snapshots, name, prefix))

    async def delete_snapshot(self, request: Request) -> Response:
        """DELETE /api/exports/{name}/snapshots/{sequence}."""
        name, prefix = request.path_params["name"], request.query_params.get("prefix")
        sequence = sequence_of(request.path_params["sequence"])
        forks = self.control.router.forks
        delete = self.life.verb("delete-snapshot", name, forks.delete_snapshot, name, sequence, prefix)
        return reply(await self.change(self.pools.stores, delete))

    async def tag(self, request: Request) -> Response:
        """POST /api/exports/{name}/tag."""
        wanted = await body(request, TagRequest)
        name = request.path_params["name"]
        tag = self.life.verb("tag", name, self.control.router.forks.tag, name, wanted)
        return reply(await self.change(self.pools.stores, tag))

    async def tags(self, request: Request) -> Response:
        """GET /api/tags."""
        prefix = request.query_params.get("prefix")
        return reply(await self.pools.stores.run(self.control.router.forks.tags, prefix))

    async def delete_tag(self, request: Request) -> Response:
        """DELETE /api/tags/{name}."""
        tag, prefix = request.path_params["name"], request.query_params.get("prefix")
        delete = self.life.verb("delete-tag", tag, self.control.router.forks.delete_tag, tag, prefix)
        return reply(await self.change(self.pools.stores, delete))

    async def promote(self, request: Request) -> Response:
        """POST /api/exports/{name}/promote."""
        wanted = await body(request, PromoteRequest)
        forks, name = self.control.router.forks, request.path_params["name"]
        if wanted.base is not None:
            make_base = self.life.verb("make-base", name, forks.make_base, name, wanted)
            return reply(await self.change(self.pools.stores, make_base))
        if wanted.sequence is not None or wanted.prefix is not None:
            raise ConfigError("a sequence or prefix means a snapshot that becomes a base; name the base too")
        promote = self.life.verb("promote", name, forks.promote, name)
        return reply(await self.change(self.pools.stores, promote))

    async def profile(self, request: Request) -> Response:
        """POST /api/exports/{name}/profile: answers when the profile ends."""
        wanted = await body(request, ProfileRequest)
        name = request.path_params["name"]
        self.control.router.check_changes()
        profile = self.life.verb("profile", name, self.control.router.forks.profile, name, wanted)
        return reply(await self.wait(request, profile))

    async def list_bases(self, request: Request) -> Response:
        """GET /api/bases."""
        list_bases, prefix = self.control.router.forks.list_bases, request.query_params.get("prefix")
        return reply(await self.pools.stores.run(list_bases, prefix))

    async def bless(self, request: Request) -> Response:
        """POST /api/bases/{name}: 201 when made, 200 when it has this content already."""
        wanted = await body(request, BlessRequest)
        self.control.router.check_changes()
        base = request.path_params["name"]
        bless = self.life.verb("bless", f"base:{base}", self.control.router.forks.bless, base, wanted)
        result = await self.wait(request, bless)
        return reply(result, 201 if result["created"] else 200)

    async def remove_base(self, request: Request) -> Response:
        """DELETE /api/bases/{name}."""
        name, prefix = request.path_params["name"], request.query_params.get("prefix")
        remove_base = self.control.router.forks.remove_base
        remove = self.life.verb("remove-base", f"base:{name}", remove_base, name, prefix)
        return reply(await self.change(self.pools.stores, remove))

    async def manifest(self, request: Request) -> Response:
        """HEAD /api/manifests/{prefix}/{name}: 200 if forks of the base need no request from this host."""
        bases, params = self.control.router.bases, request.path_params
        cached = await self.pools.looks.run(bases.manifests.peek, params["prefix"], params["name"])
        return Response(status_code=404 if cached is None else 200)

    # -- write logs --------------------------------------------------------------------------------

    async def logs(self, request: Request) -> Response:
        """GET /api/logs."""
        return reply(await self.pools.stores.run(self.control.router.logs.list))

    async def export_log(self, request: Request) -> Response:
        """POST /api/logs/{volume}/{log}/export."""
        wanted = await body(request, LogExportRequest)
        ids = request.path_params["volume"], request.path_params["log"]
        export = partial(self.control.router.logs.export, *ids, wanted.path, partial=wanted.partial)
        return reply(await self.pools.stores.run(export))

    async def delete_log(self, request: Request) -> Response:
        """DELETE /api/logs/{volume}/{log}."""
        ids = request.path_params["volume"], request.path_params["log"]
        delete = partial(self.control.router.logs.delete, *ids, force=is_set(request, "force"))
        deletion = self.life.verb("delete-log", "/".join(ids), delete)
        return reply(await self.change(self.pools.stores, deletion))

    async def hand_over(self, request: Request) -> Response:
        """POST /admin/handoff: answered by the process that was asked; after success another one serves."""
        wanted = await body(request, HandoffRequest)
        return reply(await self.pools.handoffs.run(self.control.hand_over, dry_run=wanted.dry_run))

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: up to a second old, unless a verb ended since, or the client wants a new one."""
        fresh = "no-cache" in request.headers.get("cache-control", "").lower()
        text = await self.scrape.get(fresh=fresh)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(self, request: Request) -> Response:
        """GET /health: the process works."""
        return reply(await self._state())

    async def ready(self, request: Request) -> Response:
        """GET /health/ready: 503 until every export was tried, and while the daemon stops."""
        state = await self._state()
        return reply(state, 200 if state["ready"] else 503)

    async def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = await self.pools.looks.run(self.control.health)
        return {**state, "waiting_verbs": self.pools.waits.busy}


def build_app(control: Control) -> FastAPI:
    """The application. No docs pages: their schemas cost memory and nobody reads them on a socket."""
    app = FastAPI(title="GlideFS", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    routes = Routes(control)
    export = "/api/exports/{name}"
    stored_log = "/api/logs/{volume}/{log}"
    table: tuple[tuple[str, str, Handler], ...] = (
        ("GET", "/api/exports", routes.list),
        ("GET", export, routes.show),
        ("PUT", export, routes.create),
        ("DELETE", export, routes.remove),
        ("POST", f"{export}/resize", routes.resize),
        ("POST", f"{export}/transport", routes.transport),
        ("POST", f"{export}/drain", routes.drain),
        ("POST", f"{export}/detach", routes.detach),
        ("POST", f"{export}/attach", routes.attach),
        ("POST", f"{export}/undelete", routes.undelete),
        ("POST", f"{export}/snapshot", routes.snapshot),
        ("GET", f"{export}/snapshots", routes.snapshots),
        ("DELETE", f"{export}/snapshots/{{sequence}}", routes.delete_snapshot),
        ("POST", f"{export}/tag", routes.tag),
        ("POST", f"{export}/promote", routes.promote),
        ("POST", f"{export}/profile", routes.profile),
        ("GET", "/api/volumes", routes.volumes),
        ("GET", "/api/tags", routes.tags),
        ("DELETE", "/api/tags/{name}", routes.delete_tag),
        ("GET", "/api/bases", routes.list_bases),
        ("POST", "/api/bases/{name}", routes.bless),
        ("DELETE", "/api/bases/{name}", routes.remove_base),
        ("HEAD", "/api/manifests/{prefix}/{name}", routes.manifest),
        ("GET", "/api/logs", routes.logs),
        ("POST", f"{stored_log}/export", routes.export_log),
        ("DELETE", stored_log, routes.delete_log),
        ("POST", "/admin/handoff", routes.hand_over),
        ("GET", "/metrics", routes.metrics),
        ("GET", "/health", routes.health),
        ("GET", "/health/ready", routes.ready),
        *looking_routes(control.live, control.live_of, routes.pools.looks),
    )
    for method, path, handler in table:
        looks = method in ("GET", "HEAD")
        guarded = _guarded(handler if looks else _changing(handler, routes.scrape))
        app.router.add_route(path, guarded, methods=[method])
    for status in (404, 405):
        app.add_exception_handler(status, _no_route)
    return app


def _changing(handler: Handler, scrape: Shared) -> Handler:
    """The next scrape shows what a verb did, even if it failed half-way."""

    async def changing(request: Request) -> Response:
        try:
            return await handler(request)
        finally:
            scrape.changed()

    return changing


def _guarded(handler: Handler) -> Handler:
    async def guarded(request: Request) -> Response:
        try:
            with asked_by(Asker(asked_from(request))):
                return await handler(request)
        except Exception as error:
            status, answer = describe(error)
            return reply(answer, status)

    return guarded


async def _hang_up(request: Request, who: Asker) -> None:
    """Note that the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    who.gone.set()


async def _no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    text = "no such path in the API" if status == 404 else "the path does not take this method"
    return reply(ErrorAnswer(f"{request.method} {request.url.path[:200]}: {text}"), status)
