"""One client's option haggling, from the greeting to the export that it chose.

The coroutine reads exactly what each message is long, never past it, so what a client sends early
stays in the kernel's socket buffer for the core. It bounds bytes and options; its caller bounds time.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from glidefs.core.volume import ALLOCATION_ID, MAX_SNAPSHOTS, NbdModes
from glidefs.errors import GlideError
from glidefs.transport.base import Snapshots
from glidefs.transport.nbd import proto
from glidefs.transport.nbd.proto import Option, Reply

if TYPE_CHECKING:
    from glidefs.core.volume import CoreVolume

log = logging.getLogger(__name__)

_SKIP_CHUNK = 64 * 1024
_LIST_BATCH = 256  # exports whose entries are built and sent at a time

_T = TypeVar("_T")


class NbdExport(Struct, frozen=True):
    """One export as the handshake sees it."""

    name: str
    size: int  # bytes
    read_only: bool
    core: CoreVolume
    snapshots: Snapshots | None = None

    @property
    def description(self) -> str:
        """For the person who lists exports."""
        return "GlideFS volume, read-only" if self.read_only else "GlideFS volume"


class Chosen(Struct, frozen=True):
    """The result of a handshake: an export, and what the core must know about the connection."""

    export: NbdExport
    modes: NbdModes


class ExportLookup(Protocol):
    """Names to exports, as of now. Called from the NBD server's own threads; may wait on a lock."""

    def nbd_export(self, name: str) -> NbdExport | None:
        """The export of that name, or None. The name is a client's text, not yet checked."""

    def nbd_exports(self) -> list[NbdExport]:
        """Every export, in the order to list them."""


class _Contexts(Struct, frozen=True):
    """The meta contexts that were chosen, and the name of the export that they are of."""

    export: str = ""
    allocation: bool = False
    changed: tuple[int, ...] = ()


class Negotiation:
    """Haggles on a non-blocking socket that its caller owns; look-ups run in `pool`.

    Questions to the store run in `slow`: while it does not answer, nobody waits behind them.
    """

    def __init__(
        self, connection: socket.socket, exports: ExportLookup, pool: Executor, slow: Executor
    ) -> None:
        self._connection = connection
        self._exports = exports
        self._pool = pool
        self._slow = slow
        self._loop = asyncio.get_running_loop()
        self._budget = proto.MAX_HANDSHAKE
        self._zeroes = True
        self._structured = False
        self._extended = False  # then _structured, too
        self._contexts = _Contexts()

    async def run(self) -> Chosen | None:
        """The export that the client now waits to use, told so; None when it aborted.

        Raises ProtocolViolation, EOFError or OSError when there is nothing more to say to it.
        """
        await self._send(proto.greeting())
        flags = proto.parse_client_flags(await self._read(proto.CLIENT_FLAGS_SIZE))
        self._zeroes = not flags & proto.HandshakeFlag.NO_ZEROES
        for _ in range(proto.MAX_OPTIONS):
            header = proto.parse_option_header(await self._read(proto.OPTION_SIZE))
            if header.length > proto.MAX_OPTION:
                await self._too_big(header)
                continue
            data = await self._read(header.length)
            if header.option == Option.ABORT:
                await self._send(proto.reply(header.option, Reply.ACK))
                return None
            chosen = await self._answer(header.option, data)
            if chosen is not None:
                return Chosen(chosen, self._modes(chosen))
            await asyncio.sleep(0)  # reads that never wait must not starve other clients
        raise proto.ProtocolViolation("too many options")

    def _modes(self, chosen: NbdExport) -> NbdModes:
        modes = NbdModes(chosen.read_only, self._structured, extended=self._extended)
        if not self._structured or self._contexts.export != chosen.name:
            return modes
        return replace(modes, allocation=self._contexts.allocation, changed=self._contexts.changed)

    async def _answer(self, option: int, data: bytes) -> NbdExport | None:
        """Answer one option; returns the export when it starts transmission."""
        if option == Option.EXPORT_NAME:
            return await self._export_name(data)
        try:
            if option in (Option.INFO, Option.GO):
                chosen = await self._info(option, proto.parse_export_request(data))
                return chosen if option == Option.GO else None
            if option == Option.LIST:
                await self._list(data)
            elif option == Option.STRUCTURED_REPLY:
                await self._structured_reply(data)
            elif option == Option.EXTENDED_HEADERS:
                await self._extended_headers(data)
            elif option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
                await self._meta_context(option, data)
            else:
                await self._error(option, Reply.ERR_UNSUP, "this option is not supported")
        except proto.BadOption as error:
            await self._error(option, Reply.ERR_INVALID, str(error))
        except proto.TooBig as error:
            await self._error(option, Reply.ERR_TOO_BIG, str(error))
        return None

    async def _export_name(self, data: bytes) -> NbdExport:
        """EXPORT_NAME cannot be refused in words: a wrong name ends the connection.

        So do extended headers, with which the protocol forbids it.
        """
        if self._extended:
            raise proto.ProtocolViolation("EXPORT_NAME after extended headers")
        try:
            name = proto.parse_name(data)
        except proto.BadOption as error:
            raise proto.ProtocolViolation(str(error)) from None
        export, why = await self._find(name)
        if export is None:
            raise proto.ProtocolViolation(why)
        flags = proto.transmission_flags(export.read_only, self._structured)
        await self._send(proto.export_name_reply(export.size, flags, zeroes=self._zeroes))
        return export

    async def _info(self, option: int, request: proto.ExportRequest) -> NbdExport | None:
        export, why = await self._find(request.name)
        if export is None:
            await self._error(option, Reply.ERR_UNKNOWN, why)
            return None
        await self._send(
            proto.export_infos(
                option,
                request.infos,
                name=export.name,
                description=export.description,
                size=export.size,
                flags=proto.transmission_flags(export.read_only, self._structured),
            )
        )
        return export

    async def _structured_reply(self, data: bytes) -> None:
        if data:
            raise proto.BadOption("a request for structured replies has no data")
        if self._extended:
            kind, why = Reply.ERR_EXT_HEADER_REQD, "extended headers are chosen already"
            await self._error(Option.STRUCTURED_REPLY, kind, why)
            return
        self._structured = True
        await self._send(proto.reply(Option.STRUCTURED_REPLY, Reply.ACK))

    async def _extended_headers(self, data: bytes) -> None:
        if data:
            raise proto.BadOption("a request for extended headers has no data")
        if self._extended:
            raise proto.BadOption("extended headers are chosen already")
        self._structured = self._extended = True
        await self._send(proto.reply(Option.EXTENDED_HEADERS, Reply.ACK))

    async def _meta_context(self, option: int, data: bytes) -> None:
        """Contexts count for the export that they were set for, and the last SET alone, even if it fails."""
        setting = option == Option.SET_META_CONTEXT
        if setting:
            self._contexts = _Contexts()
            if not self._structured:
                raise proto.BadOption("ask for structured replies first")
        request = proto.parse_context_request(data)
        export, why = await self._find(request.name)
        if export is None:
            await self._error(option, Reply.ERR_UNKNOWN, why)
            return
        found = _Contexts(
            export.name,
            proto.wants_allocation(option, request.queries),
            await self._snapshots(export, option, request.queries),
        )
        if setting:
            self._contexts = found
        names = [(ALLOCATION_ID, proto.ALLOCATION)] if found.allocation else []
        names += [
            (context, f"{proto.CHANGED}{sequence}")
            for context, sequence in enumerate(found.changed, ALLOCATION_ID + 1)
        ]
        answers = [proto.meta_context(option, context if setting else 0, name) for context, name in names]
        await self._send(b"".join(answers) + proto.reply(option, Reply.ACK))

    async def _snapshots(self, export: NbdExport, option: int, queries: Sequence[str]) -> tuple[int, ...]:
        """The snapshots whose contexts are offered. The store is asked only if the queries name some."""
        lookup, asked = export.snapshots, proto.asked_snapshots(queries)
        if lookup is None:
            return ()
        try:
            if proto.wants_every_snapshot(option, queries):
                return tuple(await self._call(lookup.listed, self._slow))
            offered: list[int] = []
            for sequence in asked:
                if len(offered) == MAX_SNAPSHOTS:
                    break
                if await self._call(partial(lookup.has, sequence), self._slow):
                    offered.append(sequence)
            return tuple(offered)
        except GlideError as error:
            log.info("NBD export %s: contexts of snapshots cannot be offered: %s", export.name, error)
            return ()

    async def _list(self, data: bytes) -> None:
        if data:
            raise proto.BadOption("a list request has no data")
        exports = await self._call(self._exports.nbd_exports)
        for start in range(0, len(exports), _LIST_BATCH):
            batch = exports[start : start + _LIST_BATCH]
            await self._send(
                b"".join(proto.server_entry(export.name, export.description) for export in batch)
            )
        await self._send(proto.reply(Option.LIST, Reply.ACK))

    async def _find(self, name: str) -> tuple[NbdExport | None, str]:
        """The export, or None and why. An empty name means the only export there is."""
        if name:
            export = await self._call(lambda: self._exports.nbd_export(name))
            return export, f"there is no export named {name[:128]!r}"
        exports = await self._call(self._exports.nbd_exports)
        if len(exports) == 1:
            return exports[0], ""
        return None, "name one of the exports" if exports else "nothing is exported"

    async def _too_big(self, header: proto.OptionHeader) -> None:
        await self._skip(header.length)
        if header.option == Option.EXPORT_NAME:
            raise proto.ProtocolViolation("export name is too long")
        await self._error(
            header.option, Reply.ERR_TOO_BIG, f"option data is limited to {proto.MAX_OPTION} bytes"
        )

    async def _call(self, function: Callable[[], _T], pool: Executor | None = None) -> _T:
        return await self._loop.run_in_executor(pool or self._pool, function)

    async def _error(self, option: int, kind: Reply, message: str) -> None:
        await self._send(proto.error(option, kind, message))

    async def _send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._connection, data)

    async def _read(self, length: int) -> bytes:
        self._charge(length)
        parts = bytearray()
        while len(parts) < length:
            parts += await self._receive(length - len(parts))
        return bytes(parts)

    async def _skip(self, length: int) -> None:
        self._charge(length)
        while length:
            length -= len(await self._receive(min(length, _SKIP_CHUNK)))

    async def _receive(self, most: int) -> bytes:
        data = await self._loop.sock_recv(self._connection, most)
        if not data:
            raise EOFError("the client hung up")
        return data

    def _charge(self, length: int) -> None:
        self._budget -= length
        if self._budget < 0:
            raise proto.ProtocolViolation("the handshake is too long")
