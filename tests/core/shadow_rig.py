"""Volumes with shadow verify, and a thread that answers and collects what it says."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import IO, Any

from core_rig import BLOCK, MIB, CoreRig, Vol

from glidefs.core.check import Closed
from glidefs.core.shadow import ShadowDifference, ShadowEnded, ShadowFile, ShadowFill


class Shadows:
    """Answers, while ``go`` is set, from the base as it was when the volume was opened."""

    def __init__(self, rig: CoreRig) -> None:
        self.rig = rig
        self.differences: list[ShadowDifference] = []
        self.fills: list[ShadowFill] = []
        self.ended: list[ShadowEnded] = []
        self.absent = False
        """The second source has nothing."""
        self.go = threading.Event()
        self.go.set()
        self._bases: dict[int, dict[int, bytes]] = {}
        self._paths: dict[int, Path] = {}
        self._stop = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def vol(self, size: int = 64 * MIB, *, base: dict[int, bytes] | None = None, **config: Any) -> Vol:
        """A new volume over ``base``."""
        vol = self.rig.vol(size, **config)
        vol.base = dict(base or {})
        vol.close()
        path = self.rig.tmp / f"shadow-{vol.cookie}"
        with path.open("w+b") as file:
            self.open(vol, file)
        self._paths[vol.cookie] = path
        return vol

    def path(self, vol: Vol) -> Path:
        """The file of the second source of a volume: each byte where it is in the volume."""
        return self._paths[vol.cookie]

    def open(self, vol: Vol, file: IO[bytes], known: list[tuple[int, int]] | None = None) -> Vol:
        vol.shadow = ShadowFile(file.fileno(), known or [])
        vol.open()
        self._bases[vol.cookie] = dict(vol.base)
        return vol

    def _serve(self) -> None:
        while not self._stop:
            try:
                item = self.rig.engine.shadow_next(20)
            except Closed:
                return
            if isinstance(item, ShadowDifference):
                self.differences.append(item)
            elif isinstance(item, ShadowEnded):
                self.ended.append(item)
            elif item is not None:
                self._fill(item)

    def _fill(self, item: ShadowFill) -> None:
        self.fills.append(item)
        while not self.go.wait(0.05):
            if self._stop:
                return
        vol = self.rig.vols.get(item.volume)
        if vol is None:
            return
        base = self._bases[item.volume]
        data = bytearray(
            b"".join(base.get(b, bytes(BLOCK)) for b in range(item.block, item.block + item.count))
        )
        with contextlib.suppress(Closed):
            vol.core.shadow_fill(item.block, item.count, None if self.absent else data)

    def close(self) -> None:
        self._stop = True
        self._thread.join()
