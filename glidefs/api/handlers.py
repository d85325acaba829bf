"""What each route does: it calls the router in a thread, and encodes; nothing is decided here.

A verb runs on the pool of what it waits for (see :mod:`glidefs.api.pools`), in the name of who asked for
it. What may wait without bound ends when the client is gone. The first line of a handler's docstring is
the summary of its operation in the OpenAPI document, the rest the description.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from glidefs.api import pages
from glidefs.api.errors import BadRequest
from glidefs.api.inputs import DeleteLogQuery, HandoffRequest, LogExportRequest, PrefixQuery, RemoveQuery
from glidefs.api.life import Lives
from glidefs.api.pools import Pool, Pools
from glidefs.api.shared import Shared
from glidefs.asked import Asker, asker
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


class Call:
    """A request, by what a handler needs of it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.path: dict[str, str] = request.path_params

    @property
    def name(self) -> str:
        """What the path names."""
        return self.path["name"]


Handler = Callable[[Any, Call, Any], Awaitable[Response]]
"""A method of :class:`Handlers`: the request, and its query or body as the route's struct, or None."""


def reply(value: Any, status: int = 200) -> Response:
    """An answer in JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def sequence_of(text: str) -> int:
    """A snapshot's number in a path. Raises BadRequest."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise BadRequest(f"{text[:40]!r} is not the sequence number of a snapshot")
    return int(text)


@contextmanager
def _file_of_the_client(path: str) -> Iterator[None]:
    """A file that the request names: what is wrong with it is not the daemon's fault. Raises BadRequest."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EIO, errno.EROFS) or not error.filename:
            raise
        raise BadRequest(f"{path}: {error.strerror}; name another file of the daemon's host") from error


class Handlers:
    """The handlers, and what they share. ``document`` makes the OpenAPI document, if anybody asks."""

    def __init__(self, control: Control, document: Callable[[], bytes]) -> None:
        self.control = control
        self._make_document = document
        self.pools = Pools()
        self.life = Lives(lambda: control.router.table)
        self.scrape = Shared(partial(self.pools.looks.run, control.metrics))
        self.now = Shared(partial(self.pools.looks.run, control.live))

    async def change(self, pool: Pool, call: Callable[[], Any]) -> Any:
        """A call that changes something: refused while the daemon stops."""
        self.control.router.check_changes()
        return await pool.run(call)

    async def wait(self, call: Call, wanted: Callable[[], Any]) -> Any:
        """A call that may wait without bound. It learns when the client is gone, and ends then."""
        watch = asyncio.create_task(_hang_up(call.request, asker()))
        try:
            return await self.pools.waits.run(wanted)
        finally:
            watch.cancel()

    # -- exports -----------------------------------------------------------------------------------

    async def list(self, call: Call, _: None) -> Response:
        """List the exports of this host."""
        return reply(await self.pools.looks.run(self.control.router.listing))

    async def show(self, call: Call, _: None) -> Response:
        """Show one export."""
        return reply(await self.pools.looks.run(self.control.router.show, call.name))

    async def create(self, call: Call, wanted: CreateRequest) -> Response:
        """Create a volume, empty or a fork, and serve it.

        Answers 201 when it was created, 200 when it was there with the same settings: the request may be
        repeated.
        """
        verb, name = "fork" if wanted.source else "create", call.name
        create = self.life.verb(verb, name, self.control.router.create, name, wanted)
        if wanted.wait or wanted.read_only:
            status = await self.wait(call, create)
        else:
            pool = self.pools.local if wanted.source is None else self.pools.forks
            status = await pool.run(create)
        return reply(status, 201 if status.created else 200)

    async def remove(self, call: Call, query: RemoveQuery) -> Response:
        """Delete a volume, here and in the store.

        Until gc's grace is over it can be undeleted, unless `now` is on.
        """
        options = msgspec.structs.asdict(query)
        remove = self.life.verb("remove", call.name, self.control.router.remove, call.name, **options)
        return reply(await self.pools.stores.run(remove))

    async def undelete(self, call: Call, wanted: UndeleteRequest) -> Response:
        """Put a removed volume back into the store, as it was; attach it then."""
        router = self.control.router
        undelete = self.life.verb("undelete", call.name, router.undelete, call.name, wanted.prefix)
        return reply(await self.pools.stores.run(undelete))

    async def resize(self, call: Call, wanted: ResizeRequest) -> Response:
        """Change the size of a volume while it is served."""
        resize = partial(self.control.router.resize, call.name, wanted.size, shrink=wanted.shrink)
        return reply(await self.pools.local.run(self.life.verb("resize", call.name, resize)))

    async def transport(self, call: Call, wanted: TransportRequest) -> Response:
        """Serve a volume by another transport; nobody may use it meanwhile."""
        change = partial(self.control.router.change_transport, call.name, wanted.transport)
        return reply(await self.pools.local.run(self.life.verb("transport", call.name, change)))

    async def drain(self, call: Call, wanted: DrainRequest) -> Response:
        """Upload everything that was written until now.

        Ends when the client goes away.
        """
        drain = self.life.verb("drain", call.name, self.control.router.drain, call.name, wanted.timeout)
        return reply(await self.wait(call, drain))

    async def detach(self, call: Call, wanted: DetachRequest) -> Response:
        """Stop serving here, upload everything, give the volume up: any host can attach it.

        A client that goes away leaves the export served.
        """
        detach = partial(self.control.router.detach, call.name, wanted.timeout, force=wanted.force)
        return reply(await self.wait(call, self.life.verb("detach", call.name, detach)))

    async def attach(self, call: Call, wanted: AttachRequest) -> Response:
        """Serve a volume from the store."""
        verb = "take-over" if wanted.take_over else "attach"
        attach = self.life.verb(verb, call.name, self.control.router.attach, call.name, wanted)
        return reply(await self.pools.stores.run(attach))

    async def volumes(self, call: Call, query: PrefixQuery) -> Response:
        """List the volumes of a prefix in the store, whoever serves them."""
        return reply(await self.pools.stores.run(self.control.router.stored_volumes, query.prefix))

    # -- forks -------------------------------------------------------------------------------------

    async def snapshot(self, call: Call, wanted: SnapshotRequest) -> Response:
        """Keep a volume as it is now; guests keep running.

        Each request makes a snapshot, and answers 201.
        """
        self.control.router.check_changes()
        snapshot = self.life.verb(
            "snapshot", call.name, self.control.router.forks.snapshot, call.name, wanted
        )
        return reply(await self.wait(call, snapshot), 201)

    async def snapshots(self, call: Call, query: PrefixQuery) -> Response:
        """List the snapshots of a volume, oldest first."""
        return reply(
            await self.pools.stores.run(self.control.router.forks.snapshots, call.name, query.prefix)
        )

    async def delete_snapshot(self, call: Call, query: PrefixQuery) -> Response:
        """Delete a snapshot."""
        sequence, forks = sequence_of(call.path["sequence"]), self.control.router.forks
        delete = self.life.verb(
            "delete-snapshot", call.name, forks.delete_snapshot, call.name, sequence, query.prefix
        )
        return reply(await self.change(self.pools.stores, delete))

    async def tag(self, call: Call, wanted: TagRequest) -> Response:
        """Let a tag name the volume as it is now, or one of its snapshots."""
        tag = self.life.verb("tag", call.name, self.control.router.forks.tag, call.name, wanted)
        return reply(await self.change(self.pools.stores, tag))

    async def tags(self, call: Call, query: PrefixQuery) -> Response:
        """List the tags of a prefix."""
        return reply(await self.pools.stores.run(self.control.router.forks.tags, query.prefix))

    async def delete_tag(self, call: Call, query: PrefixQuery) -> Response:
        """Delete a tag; forks that were made of it keep their data."""
        forks = self.control.router.forks
        delete = self.life.verb("delete-tag", call.name, forks.delete_tag, call.name, query.prefix)
        return reply(await self.change(self.pools.stores, delete))

    async def promote(self, call: Call, wanted: PromoteRequest) -> Response:
        """Make a read-only export read-write, or with `base` make a base of a volume or a snapshot."""
        forks, name = self.control.router.forks, call.name
        if wanted.base is not None:
            make_base = self.life.verb("make-base", name, forks.make_base, name, wanted)
            return reply(await self.change(self.pools.stores, make_base))
        if wanted.sequence is not None or wanted.prefix is not None:
            raise BadRequest("a sequence or prefix means a snapshot that becomes a base; name the base too")
        promote = self.life.verb("promote", name, forks.promote, name)
        return reply(await self.change(self.pools.stores, promote))

    async def profile(self, call: Call, wanted: ProfileRequest) -> Response:
        """Record what a fork of a base reads, as the hot set of the base.

        Answers when the profile ends; a client that goes away ends it, and nothing is kept.
        """
        self.control.router.check_changes()
        profile = self.life.verb("profile", call.name, self.control.router.forks.profile, call.name, wanted)
        return reply(await self.wait(call, profile))

    async def list_bases(self, call: Call, query: PrefixQuery) -> Response:
        """List the bases of a prefix, removed ones too until gc deletes them."""
        return reply(await self.pools.stores.run(self.control.router.forks.list_bases, query.prefix))

    async def bless(self, call: Call, wanted: BlessRequest) -> Response:
        """Make a base of a raw image on the daemon's host.

        Answers 201 when it was made, 200 when it has this content already.
        """
        self.control.router.check_changes()
        bless = self.life.verb(
            "bless", f"base:{call.name}", self.control.router.forks.bless, call.name, wanted
        )
        result = await self.wait(call, bless)
        return reply(result, 201 if result["created"] else 200)

    async def remove_base(self, call: Call, query: PrefixQuery) -> Response:
        """Remove a base: nothing new is forked from it; existing forks keep their data."""
        remove_base = self.control.router.forks.remove_base
        remove = self.life.verb("remove-base", f"base:{call.name}", remove_base, call.name, query.prefix)
        return reply(await self.change(self.pools.stores, remove))

    async def manifest(self, call: Call, _: None) -> Response:
        """Ask whether forks of a base need no request to the store from this host: 200, else 404."""
        bases = self.control.router.bases
        cached = await self.pools.looks.run(bases.manifests.peek, call.path["prefix"], call.name)
        return Response(status_code=404 if cached is None else 200)

    # -- write logs --------------------------------------------------------------------------------

    async def logs(self, call: Call, _: None) -> Response:
        """List the write logs of this host, those set aside too."""
        return reply(await self.pools.stores.run(self.control.router.logs.list))

    async def export_log(self, call: Call, wanted: LogExportRequest) -> Response:
        """Write what a log holds to a sparse file on the daemon's host."""
        ids = call.path["volume"], call.path["log"]
        export = partial(self.control.router.logs.export, *ids, wanted.path, partial=wanted.partial)
        with _file_of_the_client(wanted.path):
            return reply(await self.pools.stores.run(export))

    async def delete_log(self, call: Call, query: DeleteLogQuery) -> Response:
        """Delete a write log that no export uses."""
        ids = call.path["volume"], call.path["log"]
        delete = partial(self.control.router.logs.delete, *ids, force=query.force)
        deletion = self.life.verb("delete-log", "/".join(ids), delete)
        return reply(await self.change(self.pools.stores, deletion))

    # -- the process -------------------------------------------------------------------------------

    async def hand_over(self, call: Call, wanted: HandoffRequest) -> Response:
        """Hand all exports to a new daemon process.

        The process that was asked answers; after success another one serves.
        """
        return reply(await self.pools.handoffs.run(self.control.hand_over, dry_run=wanted.dry_run))

    async def live(self, call: Call, _: None) -> Response:
        """Say what all exports do now, what is wrong and what to do.

        Who asks within a second gets one answer.
        """
        return Response(await self.now.get(), media_type="application/json")

    async def live_of(self, call: Call, _: None) -> Response:
        """Say what an export did in the last hour.

        The history begins with the process: a handoff or restart begins it anew.
        """
        document = await self.pools.looks.run(self.control.live_of, call.name)
        return Response(document, media_type="application/json")

    async def metrics(self, call: Call, _: None) -> Response:
        """Metrics of the process as Prometheus reads them.

        Up to a second old, unless a verb ended since, or the request says `Cache-Control: no-cache`.
        """
        fresh = "no-cache" in call.request.headers.get("cache-control", "").lower()
        text = await self.scrape.get(fresh=fresh)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(self, call: Call, _: None) -> Response:
        """Say what the daemon is doing, and what is wrong."""
        return reply(await self._state())

    async def ready(self, call: Call, _: None) -> Response:
        """Say whether exports are served: 503 until every one was tried, and while the daemon stops."""
        state = await self._state()
        return reply(state, 200 if state["ready"] else 503)

    async def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = await self.pools.looks.run(self.control.health)
        return {**state, "waiting_verbs": self.pools.waits.busy}

    # -- the API itself ----------------------------------------------------------------------------

    @cached_property
    def _document(self) -> bytes:
        return self._make_document()

    async def openapi(self, call: Call, _: None) -> Response:
        """This document: OpenAPI 3.1."""
        return Response(self._document, media_type="application/json")

    async def docs(self, call: Call, _: None) -> Response:
        """A page for people with what this document says. It needs no network, so it can be saved."""
        return Response(pages.docs(self._document), headers=pages.DOCS_HEADERS, media_type="text/html")


async def _hang_up(request: Request, who: Asker) -> None:
    """Note that the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    who.gone.set()
