"""The one place where results of C calls become exceptions, and where use after close is refused."""

from __future__ import annotations

import errno as _errno
import os
import threading
from types import TracebackType
from typing import Any, Self

from glidefs.core._core import ffi, lib
from glidefs.errors import CorruptLog, DeviceError, GlideError


class CoreError(GlideError):
    """A call into the C core failed; ``errno`` is its positive error number."""

    def __init__(self, errno: int, what: str, detail: str = "") -> None:
        self.errno = errno
        self.temporary = errno in (_errno.EAGAIN, _errno.EINTR, _errno.EBUSY, _errno.ENOSPC, _errno.ENOMEM)
        super().__init__(f"{what}: {detail or os.strerror(errno)}")


class Closed(GlideError):
    """The object was closed, or its engine is shutting down."""


def error_text() -> str:
    """The C core's text about this thread's last failure; may be empty."""
    text = lib.glide_error()
    return "" if text == ffi.NULL else ffi.string(text).decode(errors="replace")


def check(result: int, what: str, *, path: str = "", device: str = "") -> int:
    """Return ``result`` unless it is negative, else raise what it means.

    ``what`` names the call for the message. With ``path``, -EUCLEAN means that the write log at
    this path is damaged (:class:`CorruptLog`); with ``device`` any failure is a
    :class:`DeviceError`. -ESHUTDOWN is :class:`Closed`, everything else :class:`CoreError`.
    """
    if result >= 0:
        return int(result)
    number, detail = -int(result), error_text()
    if number == _errno.ESHUTDOWN:
        raise Closed(f"{what}: {detail or 'closed'}")
    if path and number == _errno.EUCLEAN:
        raise CorruptLog(path, detail or "a record does not match its checksum")
    if device:
        raise DeviceError(f"{what}: {detail or os.strerror(number)}", device=device, errno=number)
    raise CoreError(number, what, detail)


class Handle:
    """A C object with an owner: ``close()`` once, no use after it.

    Calls from several threads overlap; ``close()`` first refuses new ones, then waits for those
    under way, so C never sees a handle that it has freed. ``_lock`` guards the count of users.
    """

    __slots__ = ("__weakref__", "_closing", "_idle", "_lock", "_pointer", "_users")

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer
        self._users = 0
        self._closing = False
        self._idle: threading.Event | None = None
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._closing

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the C object; further calls do nothing."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            busy = self._users > 0
            if busy:
                self._idle = threading.Event()
        self._interrupt()
        if busy and self._idle is not None:
            self._idle.wait()
        pointer, self._pointer = self._pointer, None
        self._free(pointer)

    def _interrupt(self) -> None:
        """Make calls under way return soon."""

    def _free(self, pointer: Any) -> None:
        raise NotImplementedError

    def _use(self) -> _Use:
        return _Use(self)

    def _acquire(self) -> Any:
        with self._lock:
            if self._closing:
                raise Closed(f"{type(self).__name__} is closed")
            self._users += 1
            return self._pointer

    def _release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._idle is not None:
                self._idle.set()


class _Use:
    """Holds a handle open for the length of one C call; gives the C pointer."""

    __slots__ = ("_handle",)

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __enter__(self) -> Any:
        return self._handle._acquire()

    def __exit__(self, *_: object) -> None:
        self._handle._release()
