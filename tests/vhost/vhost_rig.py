"""A volume of the core behind the vhost-user transport, without a daemon."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core_rig import CoreRig, Vol
from front_end import FrontEnd, Memory
from msgspec.structs import replace

from glidefs.config import VhostUserSettings
from glidefs.core.check import Closed
from glidefs.core.engine import EventKind
from glidefs.transport.base import Attachment
from glidefs.transport.vhost_user.transport import VhostUserTransport

MakeRig = Callable[..., CoreRig]


class VhostRig:
    """One export, "v", and its front-ends; a thread takes the core's events to the transport."""

    def __init__(
        self, rig: CoreRig, vol: Vol, directory: Path, *, read_only: bool = False, queues: int = 4
    ) -> None:
        self.rig, self.vol = rig, vol
        self.settings = VhostUserSettings(dir=str(directory), queues=queues)
        self.read_only = read_only
        self.transport = VhostUserTransport(self.settings)
        self.front_ends: list[FrontEnd] = []
        self._stop = False
        self._events = threading.Thread(target=self._take_events, daemon=True)
        self._events.start()

    def attachment(self) -> Attachment:
        size = self.vol.core.info().size
        return Attachment(
            name="v", volume_id=b"v" * 16, size=size, read_only=self.read_only, core=self.vol.core
        )

    def start(self) -> VhostRig:
        self.path = self.transport.start(self.attachment()).device
        return self

    def resize(self, size: int) -> str:
        self.vol.core.resize(size)
        return self.transport.resize(replace(self.attachment(), size=size))

    def front_end(self, memory: Memory | None = None, **config: Any) -> FrontEnd:
        """A front-end whose queues are served."""
        made = self.connect(memory, **config)
        return made.up()

    def connect(self, memory: Memory | None = None, **config: Any) -> FrontEnd:
        made = FrontEnd(self.path, memory, **config)
        self.front_ends.append(made)
        return made

    def _take_events(self) -> None:
        while not self._stop:
            try:
                for event in self.rig.engine.events_next(20):
                    if event.kind == EventKind.VHOST_DOWN:
                        self.transport.trouble(event.a)
            except Closed:
                return

    def close(self) -> None:
        self.transport.close()
        self._stop = True
        self._events.join()
        for one in self.front_ends:
            one.close()
