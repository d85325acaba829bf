"""The interface of an object store: exactly what GlideFS needs.

Keys are relative to the store's root url, ``/``-separated, without empty, ``.`` or ``..`` parts.
All methods may be called from any thread. All raise :class:`glidefs.errors.StoreError` subclasses
and never a provider's own exception.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, TypeAlias

import msgspec

from glidefs.errors import StoreError

Buffer = bytes | bytearray | memoryview
Body = Buffer | Sequence[Buffer]
"""What :meth:`ObjectStore.put` takes: one buffer, or several that are sent one after another."""

Keys: TypeAlias = list[str]
"""Named, because ``list`` is a method in the classes below."""

LIST_PAGE = 1000
"""Objects in a piece of a listing."""

MAX_KEY = 1024
"""Bytes of the longest key that every provider takes."""


class Object(msgspec.Struct, frozen=True):
    """A whole object: its bytes, and the ETag that a conditional put names it by."""

    data: bytes
    etag: str


class ObjectInfo(msgspec.Struct, frozen=True):
    """An object without its bytes. ``size`` in bytes, ``last_modified`` in unix seconds."""

    key: str
    size: int
    etag: str
    last_modified: float


class Source(msgspec.Struct, frozen=True):
    """Where the bytes of an object can be read without this store: a file, or ranges of a URL.

    ``target`` is a path, or path and query. HTTP only: ``host`` is the header of that name, ``address`` a
    packed ``struct sockaddr``, ``connect_timeout`` seconds for connecting and ``timeout`` for each part of an
    answer. Over TLS,
    ``server`` is the name that its certificate must have, ``ca`` the file of CAs that may have signed it
    (empty: any certificate is believed). Who does not get exactly the bytes that he wants from there asks
    the store, which knows what that means.
    """

    target: bytes
    host: bytes = b""
    address: bytes = b""
    timeout: float = 0.0
    connect_timeout: float = 0.0
    server: bytes = b""
    ca: bytes = b""


class ListPage(msgspec.Struct, frozen=True):
    """A piece of a listing, and the token that gets the next piece (empty: this was the last)."""

    infos: tuple[ObjectInfo, ...]
    next_token: str = ""


def buffers(body: Body) -> list[memoryview]:
    """The body as flat byte views, without copying."""
    parts = [body] if isinstance(body, bytes | bytearray | memoryview) else body
    return [memoryview(part).cast("B") for part in parts]


def body_length(body: Body) -> int:
    """Bytes in ``body``."""
    return sum(view.nbytes for view in buffers(body))


def join_body(body: Body) -> bytes:
    """The body as one ``bytes``; a copy unless it is one already."""
    return body if isinstance(body, bytes) else b"".join(buffers(body))


def check_key(key: str, op: str = "") -> str:
    """Return ``key`` if no part of it could escape from the root, else raise StoreError."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in key or len(key.encode()) > MAX_KEY:
        raise StoreError("not a legal key", key=repr(key), op=op)
    return key


def check_list_prefix(prefix: str, op: str = "list") -> str:
    """Return a listing prefix: empty, or a key with or without a trailing slash."""
    if prefix:
        check_key(prefix.removesuffix("/"), op)
    return prefix


def check_range(key: str, offset: int, length: int) -> None:
    """Refuse ranges that mean a bug in the caller (and that servers read in different ways)."""
    if offset < 0 or length <= 0:
        raise StoreError(f"illegal range {offset}+{length}", key=key, op="get_range")


class ObjectStore(ABC):
    """One bucket (or directory, or dictionary) and a root in it."""

    url: str

    @abstractmethod
    def get(self, key: str) -> Object:
        """The whole object. Raises NotFound."""

    @abstractmethod
    def get_range(self, key: str, offset: int, length: int, into: memoryview | None = None) -> Buffer:
        """Exactly ``length`` bytes from ``offset``. The hot call: guest reads.

        ``into`` has room for them: a store that can puts them there, and the result is then that.

        Raises NotFound; CorruptObject if the object ends before the range does; StoreUnavailable
        (temporary) if the connection ended before the object did.
        """

    @abstractmethod
    def get_suffix(self, key: str, length: int) -> tuple[bytes, int]:
        """The last ``length`` bytes (the whole object if it is shorter), and the object's size."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Size, ETag and time of an object. Raises NotFound."""

    @abstractmethod
    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        """Store an object whole or not at all, durably, and return its new ETag.

        With ``if_match`` only over the object of that ETag, with ``if_none_match`` only where
        there is none: else PreconditionFailed (also where ``if_match`` names a key that is gone).
        S3's ETags are of the content alone: bodies that replace each other must never repeat.
        Raises Conflict (temporary) where the provider saw two conditional puts at once.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""

    @abstractmethod
    def list_page(self, prefix: str, token: str = "") -> ListPage:
        """Some of the objects whose key begins with ``prefix``; the rest follows by ``next_token``."""

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key begins with ``prefix`` and is greater than ``start_after``.

        Nobody may rely on their order: SeaweedFS lists ``a/x`` before ``a-b``. For the same reason a
        listing goes on by the provider's token and never from the last key, which would skip objects
        there (and gc deletes what no listed root names).
        """
        token = ""
        while True:
            page = self.list_page(prefix, token)
            for info in page.infos:
                if info.key > start_after:
                    yield info
            token = page.next_token
            if not token:
                return

    @abstractmethod
    def list_dirs(self, prefix: str) -> Keys:
        """The common prefixes one ``/`` below ``prefix``, full and with their trailing slash.

        ``list_dirs("p/volumes/")`` is ``["p/volumes/a/", "p/volumes/b/"]``; :func:`dir_name` takes
        the last part. ``prefix`` is empty or ends with a slash. A provider that keeps directories
        (SeaweedFS) also lists those whose objects are all gone.
        """

    def source(self, key: str) -> Source | None:
        """Where ``key`` can be read directly, as far as is known without a request. None: ask the store."""
        return None

    def prepare(self, key: str) -> None:
        """Find out what :meth:`source` needs. May ask others than the store (credentials, names of hosts)."""
        return

    def forget(self, key: str) -> None:
        """Forget what is kept here of ``key`` (a signed URL), so that it is asked for anew."""
        return

    def check_there(self) -> None:
        """Raise ConfigError where it is known without a request that the store is not there."""
        return

    def settle_on(self) -> None:
        """This is the store that is meant: from now on, something else in its place is an error."""
        return

    def close(self) -> None:
        """Give connections back. Calls after it are an error of the caller."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def dir_name(common_prefix: str) -> str:
    """The last part of what :meth:`ObjectStore.list_dirs` returns: ``"p/volumes/a/"`` -> ``"a"``."""
    return common_prefix.rstrip("/").rsplit("/", 1)[-1]


def check_condition(key: str, if_match: str | None, if_none_match: bool) -> None:
    """Refuse a put with both conditions, or with an empty ETag that would mean "any" to some."""
    if (if_match is not None and if_none_match) or if_match == "":
        raise StoreError("contradictory conditions", key=key, op="put")
