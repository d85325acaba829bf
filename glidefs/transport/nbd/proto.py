"""The NBD handshake as bytes: constants, what a client's option says, what a server answers.

Source: "The NBD protocol" (doc/proto.md of github.com/NetworkBlockDevice/nbd), fixed newstyle
negotiation. All numbers are big-endian. Nothing here does I/O.

Greeting, server first::

    u64 NBDMAGIC · u64 IHAVEOPT · u16 handshake flags      →  server
    u32 client flags                                       ←  client

Then options until one starts transmission (or aborts)::

    u64 IHAVEOPT · u32 option · u32 length · data          ←  client
    u64 REPLY_MAGIC · u32 option · u32 reply · u32 length · data   →  server, one or more

EXPORT_NAME alone has no reply header: the server answers u64 size · u16 transmission flags · 124
zero bytes (left out when both sides said NO_ZEROES), or hangs up.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum, IntFlag

from msgspec import Struct

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
REPLY_MAGIC = 0x0003E889045565A9

MAX_STRING = 4096  # the protocol's limit of a name or description
MAX_OPTION = 64 * 1024  # data of one option that is looked at; more is answered TOO_BIG
MAX_HANDSHAKE = 1024 * 1024  # bytes of one handshake, the skipped ones included
MAX_OPTIONS = 4096  # options of one handshake
MAX_QUERIES = 256  # meta contexts that one option asks for

ALLOCATION = "base:allocation"
"""The meta context that says which parts of an export are zeros."""
CHANGED = "glidefs:changed:"
"""With the number of a snapshot behind it: the meta context of what may have changed since."""

MINIMUM_BLOCK = 512
PREFERRED_BLOCK = 4096
MAXIMUM_PAYLOAD = 32 * 1024 * 1024

_GREETING = struct.Struct(">QQH")
_CLIENT_FLAGS = struct.Struct(">I")
_OPTION = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")
_EXPORT_REPLY = struct.Struct(">QH")

CLIENT_FLAGS_SIZE = _CLIENT_FLAGS.size
OPTION_SIZE = _OPTION.size


class HandshakeFlag(IntFlag):
    """Server's and client's handshake flags; the client may only repeat the server's."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Option(IntEnum):
    """Options that are answered; every other one is UNSUPPORTED."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    """Reply types; errors have bit 31 set and may carry a message for a person."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10


class Info(IntEnum):
    """Kinds of INFO reply."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class ProtocolViolation(Exception):
    """The client broke the protocol in a way that no reply can mend: hang up."""


class BadOption(Exception):
    """The option is well framed but its data is not valid: answer ERR_INVALID."""


class TooBig(Exception):
    """The option asks for more than is answered: answer ERR_TOO_BIG."""


class OptionHeader(Struct, frozen=True):
    """One option as framed by the client."""

    option: int
    length: int  # bytes of data that follow


class ExportRequest(Struct, frozen=True):
    """Data of INFO and GO: which export, and what the client asks to be told about it."""

    name: str
    infos: frozenset[int]


def greeting() -> bytes:
    """The server's first words."""
    return _GREETING.pack(NBDMAGIC, IHAVEOPT, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


def parse_client_flags(data: bytes) -> HandshakeFlag:
    """Flags of the client. Raises ProtocolViolation for one that the server did not offer."""
    (value,) = _CLIENT_FLAGS.unpack(data)
    if value & ~int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES):
        raise ProtocolViolation(f"unknown client flags {value:#x}")
    return HandshakeFlag(value)


def parse_option_header(data: bytes) -> OptionHeader:
    """Frame of the next option. Raises ProtocolViolation when the magic is wrong."""
    magic, option, length = _OPTION.unpack(data)
    if magic != IHAVEOPT:
        raise ProtocolViolation(f"bad option magic {magic:#018x}")
    return OptionHeader(option, length)


def parse_name(data: bytes) -> str:
    """An export name. Raises BadOption when it is too long or not UTF-8."""
    if len(data) > MAX_STRING:
        raise BadOption(f"an export name has at most {MAX_STRING} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadOption("an export name must be UTF-8") from None


def parse_export_request(data: bytes) -> ExportRequest:
    """Data of INFO and GO: u32 name length · name · u16 count · count x u16. Raises BadOption."""
    if len(data) < _U32.size + _U16.size:
        raise BadOption("option data is too short")
    (name_length,) = _U32.unpack_from(data)
    count_at = _U32.size + name_length
    if count_at + _U16.size > len(data):
        raise BadOption("name length exceeds the option's data")
    (count,) = _U16.unpack_from(data, count_at)
    infos_at = count_at + _U16.size
    if len(data) - infos_at != count * _U16.size:
        raise BadOption("number of information requests does not match the option's length")
    name = parse_name(data[_U32.size : count_at])
    return ExportRequest(name, frozenset(struct.unpack_from(f">{count}H", data, infos_at)))


class ContextRequest(Struct, frozen=True):
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT: of which export, and what is asked for."""

    name: str
    queries: tuple[str, ...]


def parse_context_request(data: bytes) -> ContextRequest:
    """u32 name length · name · u32 count · count x (u32 length · query). Raises BadOption, TooBig."""
    name, at = _string(data, 0)
    if len(data) - at < _U32.size:
        raise BadOption("option data is too short")
    (count,) = _U32.unpack_from(data, at)
    if count > MAX_QUERIES:
        raise TooBig(f"at most {MAX_QUERIES} meta contexts can be asked for")
    at += _U32.size
    queries = []
    for _ in range(count):
        query, at = _string(data, at)
        queries.append(query)
    if at != len(data):
        raise BadOption("number of meta contexts does not match the option's length")
    return ContextRequest(name, tuple(queries))


def _string(data: bytes, at: int) -> tuple[str, int]:
    """The string at ``at``, u32 length · UTF-8, and where it ends."""
    if len(data) - at < _U32.size:
        raise BadOption("option data is too short")
    (length,) = _U32.unpack_from(data, at)
    at += _U32.size
    if length > MAX_STRING:
        raise BadOption(f"a string has at most {MAX_STRING} bytes")
    if length > len(data) - at:
        raise BadOption("the length of a string exceeds the option's data")
    try:
        return data[at : at + length].decode("utf-8"), at + length
    except UnicodeDecodeError:
        raise BadOption("a string must be UTF-8") from None


def wants_allocation(option: int, queries: Sequence[str]) -> bool:
    """Whether the queries of LIST or SET name the context: LIST takes all for none, and a name space."""
    if option == Option.LIST_META_CONTEXT and (not queries or "base:" in queries):
        return True
    return ALLOCATION in queries


def wants_every_snapshot(option: int, queries: Sequence[str]) -> bool:
    """Whether the contexts of all snapshots are asked for, which only LIST can do."""
    wide = not queries or CHANGED in queries or CHANGED.partition(":")[0] + ":" in queries
    return option == Option.LIST_META_CONTEXT and wide


def asked_snapshots(queries: Sequence[str]) -> list[int]:
    """The numbers of the snapshots whose contexts are asked for by name, each once, in their order."""
    numbers = [query[len(CHANGED) :] for query in queries if query.startswith(CHANGED)]
    # A context has one name: no signs, no leading zeros, no digits of other scripts.
    good = [text for text in numbers if len(text) <= 20 and text.isascii() and text.isdigit()]
    return [int(text) for text in dict.fromkeys(good) if text == str(int(text))]


def meta_context(option: int, context: int, name: str) -> bytes:
    """A context under its id: u32 id · name. In an answer to LIST the id means nothing."""
    return reply(option, Reply.META_CONTEXT, _U32.pack(context) + name.encode())


def transmission_flags(read_only: bool, structured: bool = False) -> TransmissionFlag:
    """What every export offers; a read-only one offers nothing that writes, and DF needs structured replies.

    FAST_ZERO is always true here: a write of zeroes only touches metadata.
    """
    flags = (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.CAN_MULTI_CONN
        | TransmissionFlag.SEND_CACHE
    )
    if structured:
        flags |= TransmissionFlag.SEND_DF
    if read_only:
        return flags | TransmissionFlag.READ_ONLY
    return (
        flags
        | TransmissionFlag.SEND_TRIM
        | TransmissionFlag.SEND_WRITE_ZEROES
        | TransmissionFlag.SEND_FAST_ZERO
    )


def reply(option: int, kind: Reply, data: bytes = b"") -> bytes:
    """One option reply."""
    return _REPLY.pack(REPLY_MAGIC, option, kind, len(data)) + data


def error(option: int, kind: Reply, message: str) -> bytes:
    """An error reply with a message for the person at the client."""
    return reply(option, kind, message.encode()[:MAX_STRING])


def server_entry(name: str, description: str) -> bytes:
    """One export in the answer to LIST: u32 name length · name · description."""
    encoded = name.encode()
    return reply(Option.LIST, Reply.SERVER, _U32.pack(len(encoded)) + encoded + description.encode())


def export_infos(
    option: int, infos: Iterable[int], *, name: str, description: str, size: int, flags: TransmissionFlag
) -> bytes:
    """INFO replies of an export and the final ACK.

    EXPORT and BLOCK_SIZE are always told: a client that does not read the second still must keep
    to it. NAME and DESCRIPTION come when they were asked for.
    """
    asked = frozenset(infos)
    parts = [
        _INFO_EXPORT.pack(Info.EXPORT, size, flags),
        _INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, MINIMUM_BLOCK, PREFERRED_BLOCK, MAXIMUM_PAYLOAD),
    ]
    if Info.NAME in asked:
        parts.append(_U16.pack(Info.NAME) + name.encode())
    if Info.DESCRIPTION in asked:
        parts.append(_U16.pack(Info.DESCRIPTION) + description.encode())
    return b"".join(reply(option, Reply.INFO, part) for part in parts) + reply(option, Reply.ACK)


def export_name_reply(size: int, flags: TransmissionFlag, *, zeroes: bool) -> bytes:
    """The answer to EXPORT_NAME: it has no header, and transmission starts right behind it."""
    return _EXPORT_REPLY.pack(size, flags) + (bytes(124) if zeroes else b"")
