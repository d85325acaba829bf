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
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << bit for bit in range(5))

REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")


class OptionReply(NamedTuple):
    """One reply to an option."""

    option: int
    kind: int
    data: bytes


class ExportInfo(NamedTuple):
    """What GO or EXPORT_NAME told."""

    size: int
    flags: int


class Refused(Exception):
    """The server answered an option with an error."""

    def __init__(self, kind: int, message: str) -> None:
        super().__init__(f"{kind:#x}: {message}")
        self.kind = kind
        self.message = message


class RequestFailed(Exception):
    """The server answered a request with an error number."""

    def __init__(self, errno: int) -> None:
        super().__init__(f"NBD error {errno}")
        self.errno = errno


def request(kind: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    """Header of a transmission request."""
    return REQUEST.pack(REQUEST_MAGIC, flags, kind, cookie, offset, length)


def export_request(name: str, infos: tuple[int, ...] = ()) -> bytes:
    """Data of INFO and GO."""
    encoded = name.encode()
    return struct.pack(f">I{len(encoded)}sH{len(infos)}H", len(encoded), encoded, len(infos), *infos)


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
        while replies[-1].kind in (Reply.SERVER, Reply.INFO):
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
        self.send(request(kind, self._cookie, offset, length, flags) + data)
        return self._cookie

    def reply(self) -> tuple[int, int]:
        """Hear a reply header: cookie, error."""
        magic, error, cookie = SIMPLE_REPLY.unpack(self.read(SIMPLE_REPLY.size))
        assert magic == REPLY_MAGIC, hex(magic)
        return cookie, error

    def call(self, kind: int, offset: int = 0, length: int = 0, **more: Any) -> bytes:
        """One request at a time: its data, if a read. Raises RequestFailed."""
        sent = self.submit(kind, offset, length, **more)
        cookie, error = self.reply()
        assert cookie == sent
        if error:
            raise RequestFailed(error)
        return self.read(length) if kind == READ else b""

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
