"""All exports at one moment, for `list`, `/health` and `/metrics`.

The core is asked once for all of them: a round trip to a worker for each was most of what a list of a
thousand exports took. Nothing of it is kept: a verb, and a guest's write, is seen by the next look.
"""

from __future__ import annotations

from typing import NamedTuple

from glidefs.core.figures import VolumeInfo, infos
from glidefs.core.volume import CoreVolume
from glidefs.exports.health import judged
from glidefs.exports.requests import ExportStatus
from glidefs.exports.table import ExportTable
from glidefs.store.state import StoreState


class Seen(NamedTuple):
    """An export: its status, and if it has a transport, its volume in the core and the core's answer."""

    status: ExportStatus
    core: CoreVolume | None = None
    info: VolumeInfo | None = None


def survey(table: ExportTable, store: StoreState, max_dirty_age: float) -> list[Seen]:
    """All exports, by name. A volume that is opened or closed meanwhile is looked at by itself."""
    entries = table.all()
    cores = {volume.cookie: volume.core for entry in entries if (volume := entry.volume) is not None}
    found = zip(cores, infos(list(cores.values())), strict=True)
    told = {cookie: info for cookie, info in found if info is not None}
    seen = []
    for entry in entries:
        status = judged(entry.status(told=told), store, max_dirty_age)
        volume = entry.volume if entry.transport is not None else None
        seen.append(Seen(status) if volume is None else Seen(status, volume.core, told.get(volume.cookie)))
    return seen
