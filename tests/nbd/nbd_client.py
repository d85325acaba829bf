"""A raw NBD client for tests: says exactly the bytes it is told to, right or wrong."""

from __future__ import annotations

import socket
import struct
import time
from typing import Any, NamedTuple, Self

from glidefs.transport.nbd import proto
from glidefs.transport.nbd.proto import Option, Reply

DEADLINE = 20.0
REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))

REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
CHUNK_MAGIC = 0x668E33EF
EXTENDED = struct.Struct(">IHHQQQ")  # of a request, and of a chunk of a reply
EXTENDED_MAGIC = 0x21E41C71
EXTENDED_CHUNK_MAGIC = 0x6E8A278C
DONE = 1
NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, STATUS_EXT = 0, 1, 2, 5, 6
ERROR, ERROR_OFFSET = 32769, 32770


class OptionReply(NamedTuple):
    """One reply to an option."""

    option: int
    kind: int
    data: bytes


class ExportInfo(NamedTuple):
    """What GO or EXPORT_NAME told."""

    size: int
    flags: int


class Chunk(NamedTuple):
    """One chunk of a structured reply."""

    flags: int
    kind: int
    cookie: int
    data: bytes


class Extent(NamedTuple):
    """What BLOCK_STATUS says of a range: bytes, and flags (1 hole, 2 zero)."""

    length: int
    flags: int


class Refused(Exception):
    """The server answered an option with an error."""

    def __init__(self, kind: int, message: str) -> None:
        super().__init__(f"{kind:#x}: {message}")
        self.kind = kind
        self.message = message


class RequestFailed(Exception):
    """The server answered a request with an error number."""

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(f"NBD error {errno} {message}")
        self.errno = errno
        self.message = message


def request(kind: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    """Header of a transmission request."""
    return REQUEST.pack(REQUEST_MAGIC, flags, kind, cookie, offset, length)


def extended_request(kind: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    """The same with an extended header."""
    return EXTENDED.pack(EXTENDED_MAGIC, flags, kind, cookie, offset, length)


def export_request(name: str, infos: tuple[int, ...] = ()) -> bytes:
    """Data of INFO and GO."""
    encoded = name.encode()
    return struct.pack(f">I{len(encoded)}sH{len(infos)}H", len(encoded), encoded, len(infos), *infos)


def context_request(name: str, *queries: str) -> bytes:
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    parts = [name.encode(), *(query.encode() for query in queries)]
    words = [struct.pack(">I", len(part)) + part for part in parts]
    return words[0] + struct.pack(">I", len(queries)) + b"".join(words[1:])


class RawClient:
    """A connection to a server's Unix socket path or TCP address, or any connected socket."""

    def __init__(self, where: str | tuple[str, int] | socket.socket, timeout: float = DEADLINE) -> None:
        if isinstance(where, socket.socket):
            self.socket = where
        elif isinstance(where, str):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.settimeout(timeout)
            self.socket.connect(where)
        else:
            self.socket = socket.create_connection(where, timeout)
        self.socket.settimeout(timeout)
        self._cookie = 0
        self._unheard = 0
        self.context = 0
        self.extended = False
        self.offsets: dict[int, int] = {}
        """Of requests with extended headers, by cookie: replies repeat them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    # ---- bytes ----

    def send(self, data: bytes) -> None:
        """Say these bytes."""
        self.socket.sendall(data)

    def read(self, length: int) -> bytes:
        """Hear exactly that many. Raises EOFError."""
        data = bytearray()
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            if not part:
                raise EOFError(f"hung up after {len(data)} of {length} bytes")
            data += part
        return bytes(data)

    def hung_up(self) -> bool:
        """Wait until the server hangs up; what it still says is skipped. False after the deadline."""
        end = time.monotonic() + DEADLINE
        try:
            while time.monotonic() < end:
                if not self.socket.recv(65536):
                    return True
        except TimeoutError:
            return False
        except ConnectionError:
            return True
        return False

    # ---- handshake ----

    def greet(self, flags: int = 3) -> Self:
        """Hear the greeting, answer with client flags."""
        magic, option_magic, offered = struct.unpack(">QQH", self.read(18))
        assert (magic, option_magic, offered) == (proto.NBDMAGIC, proto.IHAVEOPT, 3)
        self.send(struct.pack(">I", flags))
        return self

    def option(self, option: int, data: bytes = b"", length: int | None = None) -> None:
        """Send an option; `length` may lie."""
        size = len(data) if length is None else length
        self.send(struct.pack(">QII", proto.IHAVEOPT, option, size) + data)

    def option_reply(self) -> OptionReply:
        """Hear one option reply."""
        magic, option, kind, length = struct.unpack(">QIII", self.read(20))
        assert magic == proto.REPLY_MAGIC
        assert length <= proto.MAX_OPTION
        return OptionReply(option, kind, self.read(length))

    def ask(self, option: int, data: bytes = b"") -> list[OptionReply]:
        """Send an option and hear its replies, the last of which is an ACK or an error."""
        self.option(option, data)
        replies = [self.option_reply()]
        while replies[-1].kind in (Reply.SERVER, Reply.INFO, Reply.META_CONTEXT):
            replies.append(self.option_reply())
        assert all(reply.option == option for reply in replies)
        return replies

    def infos(self, option: int, name: str, infos: tuple[int, ...] = ()) -> dict[int, bytes]:
        """INFO or GO: information by kind. Raises Refused."""
        *parts, last = self.ask(option, export_request(name, infos))
        if last.kind != Reply.ACK:
            raise Refused(last.kind, last.data.decode())
        return {struct.unpack_from(">H", part.data)[0]: part.data[2:] for part in parts}

    def go(self, name: str) -> ExportInfo:
        """Start transmission."""
        told = self.infos(Option.GO, name)
        return ExportInfo(*struct.unpack(">QH", told[proto.Info.EXPORT]))

    def structured(self) -> Self:
        """Negotiate structured replies."""
        assert self.ask(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
        return self

    def extend(self) -> Self:
        """Negotiate extended headers."""
        assert self.ask(Option.EXTENDED_HEADERS)[-1].kind == Reply.ACK
        self.extended = True
        return self

    def contexts(self, name: str, *queries: str, option: int = Option.SET_META_CONTEXT) -> dict[str, int]:
        """Ids of meta contexts by name. Raises Refused."""
        *found, last = self.ask(option, context_request(name, *queries))
        if last.kind != Reply.ACK:
            raise Refused(last.kind, last.data.decode())
        return {one.data[4:].decode(): struct.unpack_from(">I", one.data)[0] for one in found}

    def sparse(self, name: str) -> Self:
        """Everything up to transmission, with structured replies and base:allocation."""
        self.greet().structured()
        (self.context,) = self.contexts(name, "base:allocation").values()
        self.go(name)
        return self

    def export_name(self, name: str, zeroes: bool = False) -> ExportInfo:
        """Start transmission the old way."""
        self.option(Option.EXPORT_NAME, name.encode())
        info = ExportInfo(*struct.unpack(">QH", self.read(10)))
        if zeroes:
            assert self.read(124) == bytes(124)
        return info

    # ---- transmission ----

    def submit(self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b"") -> int:
        """Send a request; returns its cookie."""
        self._cookie += 1
        if self.extended:
            self.offsets[self._cookie] = offset
            flags |= PAYLOAD_LEN if kind == WRITE else 0
            self.send(extended_request(kind, self._cookie, offset, length, flags) + data)
            return self._cookie
        self.send(request(kind, self._cookie, offset, length, flags) + data)
        return self._cookie

    def reply(self) -> tuple[int, int]:
        """Hear a reply header: cookie, error."""
        magic, error, cookie = SIMPLE_REPLY.unpack(self.read(SIMPLE_REPLY.size))
        assert magic == REPLY_MAGIC, hex(magic)
        return cookie, error

    def chunk(self) -> Chunk:
        """Hear one chunk of a structured reply, or of an extended one."""
        if self.extended:
            magic, flags, kind, cookie, offset, length = EXTENDED.unpack(self.read(EXTENDED.size))
            assert magic == EXTENDED_CHUNK_MAGIC, hex(magic)
            assert offset == self.offsets[cookie]
            return Chunk(flags, kind, cookie, self.read(length))
        magic, flags, kind, cookie, length = CHUNK.unpack(self.read(CHUNK.size))
        assert magic == CHUNK_MAGIC, hex(magic)
        return Chunk(flags, kind, cookie, self.read(length))

    def chunks(self, cookie: int) -> list[Chunk]:
        """Hear the structured reply of the only request under way. Raises RequestFailed."""
        heard = [self.chunk()]
        while not heard[-1].flags & DONE:
            heard.append(self.chunk())
        assert {chunk.cookie for chunk in heard} == {cookie}
        for chunk in heard:
            if chunk.kind & 1 << 15:
                errno, length = struct.unpack_from(">IH", chunk.data)
                raise RequestFailed(errno, chunk.data[6 : 6 + length].decode())
        return heard

    def ask_chunks(self, kind: int, offset: int, length: int, flags: int = 0) -> list[Chunk]:
        """One request that has a structured reply."""
        return self.chunks(self.submit(kind, offset, length, flags))

    def read_sparse(self, offset: int, length: int, flags: int = 0) -> tuple[bytes, list[Extent]]:
        """Read by structured replies: the data, and which parts came as data (0) and as holes (3)."""
        data, parts = bytearray(b"?" * length), {}
        for chunk in self.ask_chunks(READ, offset, length, flags):
            if chunk.kind == NONE:
                continue
            (at,) = struct.unpack_from(">Q", chunk.data)
            at -= offset
            if chunk.kind == OFFSET_HOLE:
                (size,) = struct.unpack_from(">I", chunk.data, 8)
                content = bytes(size)
            else:
                assert chunk.kind == OFFSET_DATA
                content = chunk.data[8:]
            assert content
            assert 0 <= at <= length - len(content)
            assert at not in parts
            parts[at] = Extent(len(content), 3 if chunk.kind == OFFSET_HOLE else 0)
            data[at : at + len(content)] = content
        assert sum(part.length for part in parts.values()) == length
        return bytes(data), [parts[at] for at in sorted(parts)]

    def statuses(self, offset: int, length: int, flags: int = 0) -> dict[int, list[Extent]]:
        """The extents of each context from ``offset`` on, at most ``length`` bytes of them, by its id."""
        found: dict[int, list[Extent]] = {}
        for chunk in self.ask_chunks(BLOCK_STATUS, offset, length, flags):
            assert chunk.kind == (STATUS_EXT if self.extended else STATUS)
            (context,) = struct.unpack_from(">I", chunk.data)
            form, at = (">QQ", 8) if self.extended else (">II", 4)
            extents = [Extent(*pair) for pair in struct.iter_unpack(form, chunk.data[at:])]
            assert not self.extended or struct.unpack_from(">I", chunk.data, 4) == (len(extents),)
            assert extents
            assert all(extent.length for extent in extents)
            assert sum(extent.length for extent in extents) <= length
            assert context not in found
            found[context] = extents
        return found

    def block_status(self, offset: int, length: int, flags: int = 0) -> list[Extent]:
        """The extents of the only context."""
        ((context, extents),) = self.statuses(offset, length, flags).items()
        assert context == self.context
        return extents

    def allocation(self, size: int, step: int = 1 << 31) -> list[Extent]:
        """base:allocation of a whole export, neighbours of one kind together."""
        return self.map_of(self.context, size, step)

    def map_of(self, context: int, size: int, step: int = 1 << 31) -> list[Extent]:
        """What a context says of a whole export, neighbours of one kind together."""
        found: list[Extent] = []
        at = 0
        while at < size:
            for extent in self.statuses(at, min(step, size - at))[context]:
                if found and found[-1].flags == extent.flags:
                    found[-1] = Extent(found[-1].length + extent.length, extent.flags)
                else:
                    found.append(extent)
                at += extent.length
        return found

    def call(self, kind: int, offset: int = 0, length: int = 0, **more: Any) -> bytes:
        """One request at a time: its data, if a read. Raises RequestFailed."""
        if self.extended and kind == READ:
            return self.read_sparse(offset, length, **more)[0]
        if self.extended:
            (chunk,) = self.chunks(self.submit(kind, offset, length, **more))
            assert (chunk.kind, chunk.data) == (NONE, b"")
            return b""
        sent = self.submit(kind, offset, length, **more)
        cookie, error = self.reply()
        assert cookie == sent
        if error:
            raise RequestFailed(error)
        return self.read(length) if kind == READ else b""

    def call_simple(self, kind: int, offset: int, length: int) -> None:
        """A request without data either way."""
        sent = self.submit(kind, offset, length)
        assert self.reply() == (sent, 0)

    def send_write(self, offset: int, data: bytes) -> None:
        """A write whose reply :meth:`hear_all` hears."""
        self.submit(WRITE, offset, len(data), data=data)
        self._unheard += 1
        if self._unheard == 512:
            self.hear_all()

    def hear_all(self) -> None:
        """Hear the replies of those writes."""
        while self._unheard:
            assert self.reply()[1] == 0
            self._unheard -= 1

    def pread(self, offset: int, length: int) -> bytes:
        """Read."""
        return self.call(READ, offset, length)

    def pwrite(self, offset: int, data: bytes, flags: int = 0) -> None:
        """Write."""
        self.call(WRITE, offset, len(data), data=data, flags=flags)

    def flush(self) -> None:
        """Flush."""
        self.call(FLUSH)

    def disconnect(self) -> None:
        """DISC, the polite way."""
        self.submit(DISC)
