"""Checks once per URL that the store behaves as GlideFS needs, without delaying the start of exports."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path

from glidefs.config import StoreSettings
from glidefs.errors import CorruptObject, StoreError, StoreUnsupported
from glidefs.formats.atomic import read_file
from glidefs.store.probe import probe_store
from glidefs.store.resilient import ResilientStore

log = logging.getLogger(__name__)

DEADLINE = 5.0
PATIENCE = 0.5
"""The same where exports wait to be served."""
RETRY = 15.0
MAX_MARKER = 4096
"""Bytes: it is two URLs."""


class StoreCheck:
    """``marker`` is the file that remembers a store that passed; ``stopping`` ends the retries."""

    def __init__(
        self, store: ResilientStore, settings: StoreSettings, marker: Path, stopping: threading.Event
    ) -> None:
        self._store = store
        self._prefix = settings.default_prefix
        self._marker = marker
        self._identity = f"{settings.url} {settings.endpoint_url or ''}\n"
        self._stopping = stopping

    def run(self, *, has_exports: bool) -> None:
        """Try the store, or begin to try it later if it does not answer.

        Raises StoreUnsupported; StoreError if it cannot be used and this host served nothing before.
        """
        if self._store.is_new_directory:
            return  # nothing is written into it before there is something to keep
        with contextlib.suppress(OSError, CorruptObject):
            if read_file(self._marker, MAX_MARKER) == self._identity.encode():
                return
        try:
            self._once(PATIENCE if has_exports else DEADLINE)
        except StoreUnsupported:
            raise
        except StoreError as error:
            if not error.temporary and not has_exports:
                raise
            log.warning("the store could not be tested, trying again later: %s", error)
            threading.Thread(target=self._later, name="store-probe", daemon=True).start()

    def _once(self, patience: float = DEADLINE) -> None:
        probe_store(self._store.view("background", patience), self._prefix)
        try:
            self._marker.write_bytes(self._identity.encode())
        except OSError as error:  # only a hint: the next start tries the store again
            log.warning("%s cannot be written: %s", self._marker, error)

    def _later(self) -> None:
        while not self._stopping.wait(RETRY):
            try:
                self._once()
                log.info("the store answers and keeps what GlideFS relies on")
                return
            except StoreUnsupported as error:
                log.critical("%s", error)
                return
            except (StoreError, OSError) as error:
                log.warning("the store could not be tested, trying again later: %s", error)
