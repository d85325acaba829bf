"""What happens to exports, bases and the store: one line in the log each, made here and nowhere else.

A line says what happened to which export and volume, who asked, and how long it took; in the format "json"
each of these is a field. The same line says when it failed, and why.

    create v1: done in 0.004 s; volume 5f0c..., by uid 0 pid 812
    drain v1: failed after 2.001 s: not drained within 2 s; volume 5f0c..., by 10.0.0.7:40312
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from msgspec import Struct

from glidefs.asked import Asker, asker

log = logging.getLogger(__name__)

KEPT = 200


class PastEvent(Struct, frozen=True):
    """An event that is over: when it ended (unix seconds), and what its line in the log says."""

    at: float
    verb: str
    export: str
    outcome: str
    seconds: float
    by: str
    text: str


recent: deque[PastEvent] = deque(maxlen=KEPT)
"""The last events of this process, oldest first. Any thread may append; copy it to iterate."""


class Event:
    """One that is under way. ``detail`` is added to its line; with ``silent`` nothing happened after all."""

    __slots__ = ("by", "detail", "export", "silent", "verb", "volume_id")

    def __init__(self, verb: str, export: str, volume_id: str, by: Asker) -> None:
        self.verb = verb
        self.export = export
        self.volume_id = volume_id
        self.by = by
        self.detail = ""
        self.silent = False


@contextmanager
def event(verb: str, export: str = "", volume_id: str = "", by: Asker | None = None) -> Iterator[Event]:
    """What the body does to ``export`` is one line when it ends. Errors go on."""
    what = Event(verb, export, volume_id, by or asker())
    began = time.monotonic()
    try:
        yield what
    except BaseException as error:
        why = " ".join(str(error).split()) or type(error).__name__
        _say(what, logging.WARNING, "failed", time.monotonic() - began, why)
        raise
    if not what.silent:
        _say(what, logging.INFO, "done", time.monotonic() - began, what.detail)


def happened(
    verb: str,
    detail: str,
    *,
    export: str = "",
    volume_id: str = "",
    seconds: float = 0.0,
    level: int = logging.WARNING,
    by: Asker | None = None,
) -> None:
    """An event that nobody asked for and that is over, in its own words; ``seconds``: how long it lasted."""
    _say(Event(verb, export, volume_id, by or asker()), level, "happened", seconds, detail)


def _say(what: Event, level: int, outcome: str, seconds: float, detail: str) -> None:
    fields: dict[str, Any] = {"event": what.verb, "export": what.export, "volume_id": what.volume_id}
    fields = {key: value for key, value in fields.items() if value}
    fields |= {"by": what.by.who, "outcome": outcome, "seconds": round(seconds, 3)}
    whose = f"volume {what.volume_id}, " if what.volume_id else ""
    if outcome != "happened":
        subject = f"{what.verb} {what.export}".rstrip()
        said = f"{outcome} {'in' if outcome == 'done' else 'after'} {seconds:.3f} s"
        detail = ": ".join(part for part in (subject, said, detail) if part)
    recent.append(PastEvent(time.time(), what.verb, what.export, outcome, seconds, what.by.who, detail))
    log.log(level, "%s; %sby %s", detail, whose, what.by.who, extra={"event": fields})
