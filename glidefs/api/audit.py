"""The audit log: one line for each request that may change something, whatever came of it; and its span.

It says who asked, from where, for what, with what options, and how it ended. The line is in the log, and
with `[api] audit_log` in a file, before the client has its answer. A file that cannot be written is an error
in the log and stops nothing: the log has the line all the same.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct

from glidefs.api.access import Caller
from glidefs.api.pools import Pool
from glidefs.formats.atomic import write_all
from glidefs.tracing.spans import ERROR, Sink, Span, Value

MAX_VALUE = 200
"""Characters of an option that are kept."""
log = logging.getLogger("glidefs.audit")


class Record(Struct, frozen=True, kw_only=True):
    """A request that ended. ``wanted`` is its query or body, if it came so far; ``reason`` why it failed.

    ``problem`` is the kind of that. ``export``: the one that its path names. ``headers``: those of its trace.
    """

    caller: Caller
    method: str
    path: str
    verb: str
    status: int
    seconds: float
    wanted: Any = None
    reason: str = ""
    problem: str = ""
    export: str = ""
    headers: Mapping[str, str] = {}

    @property
    def outcome(self) -> str:
        """In a word."""
        if self.status < 400:
            return "done"
        return "refused" if self.status in (401, 403) else "failed"

    @property
    def options(self) -> dict[str, Any]:
        """What was asked for beside the defaults."""
        if self.wanted is None:
            return {}
        asked = msgspec.structs.asdict(self.wanted)
        usual = {field.name: field.default for field in msgspec.structs.fields(self.wanted)}
        return {
            name: value[:MAX_VALUE] if isinstance(value, str) else value
            for name, value in asked.items()
            if value != usual[name]
        }


class Audit:
    """Where the lines go. ``path``: a file that is appended to and made if it is not there, or None.

    ``sink`` gets a span of each request.
    """

    def __init__(self, path: str | None, sink: Sink | None = None) -> None:
        self._path = path
        self._sink = sink
        self._failed = False
        self._writer = Pool(1)

    async def note(self, record: Record) -> None:
        """Write the line of a request; in the file when this returns."""
        _say(record)
        if self._sink is not None:
            self._sink.put(_span(record))
        if self._path is not None:
            await self._writer.run(self._write, (json.dumps(_fields(record)) + "\n").encode())

    def _write(self, line: bytes) -> None:
        """Opened each time: the file may be moved away at any moment, and another process may write it."""
        assert self._path is not None
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                write_all(fd, line)
            finally:
                os.close(fd)
        except OSError as error:
            if not self._failed:
                log.error("[api] audit_log %s: %s; the lines are in the log only", self._path, error.strerror)
            self._failed = True
        else:
            self._failed = False


def _span(record: Record) -> Span:
    """With attributes as OpenTelemetry names them for servers: there an answer below 500 is no failure."""
    attributes: dict[str, Value] = {
        "http.request.method": record.method,
        "url.path": record.path,
        "http.response.status_code": record.status,
    }
    if record.export:
        attributes["glidefs.export"] = record.export
    if record.problem:
        attributes["glidefs.problem"] = record.problem
    if record.status >= 500:
        attributes[ERROR] = record.problem or str(record.status)
    now = time.time_ns()
    return Span(
        name=record.verb,
        begin=now - int(record.seconds * 1e9),
        end=now,
        attributes=attributes,
        answers=record.headers,
    )


def _fields(record: Record) -> dict[str, Any]:
    caller = record.caller
    fields: dict[str, Any] = {
        "time": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"),
        "by": caller.who,
        "token": caller.token,
        "from": caller.address,
        "scope": caller.scope.word,
        "method": record.method,
        "path": record.path,
        "verb": record.verb,
        "options": record.options,
        "outcome": record.outcome,
        "status": record.status,
        "seconds": round(record.seconds, 3),
    }
    return fields | ({"reason": record.reason} if record.reason else {})


def _say(record: Record) -> None:
    fields = {
        "by": record.caller.who,
        "verb": record.verb,
        "method": record.method,
        "path": record.path,
        "outcome": record.outcome,
        "status": record.status,
        "seconds": round(record.seconds, 3),
    }
    options = "".join(f" {name}={value}" for name, value in record.options.items())
    log.info(
        "%s%s, %s %s: %d in %.3f s; by %s",
        record.verb,
        options,
        record.method,
        record.path,
        record.status,
        record.seconds,
        record.caller.who,
        extra={"event": fields},
    )
