"""A put's buffers as the file that botocore reads, without joining them into another copy."""

from __future__ import annotations

import io
import os

from glidefs.store.base import Body, buffers

_PIECE = 1 << 20
"""Bytes per read when all is asked for."""


class BodyReader(io.RawIOBase):
    """Reads through a list of buffers. Seekable, because the signature reads the body once before."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self._views = buffers(body)
        self._length = sum(view.nbytes for view in self._views)
        self._view = 0
        self._offset = 0
        self._position = 0

    def __len__(self) -> int:
        return self._length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = min(max(base + offset, 0), self._length)
        self._view, self._offset = 0, self._position
        while self._view < len(self._views) and self._offset >= self._views[self._view].nbytes:
            self._offset -= self._views[self._view].nbytes
            self._view += 1
        return self._position

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most ``size``: fewer where a buffer ends; empty at the end."""
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(_PIECE), b""))
        while self._view < len(self._views):
            view = self._views[self._view]
            left = view.nbytes - self._offset
            if left:
                piece = view[self._offset : self._offset + min(left, size)]
                self._offset += piece.nbytes
                self._position += piece.nbytes
                return piece.tobytes()
            self._view += 1
            self._offset = 0
        return b""
