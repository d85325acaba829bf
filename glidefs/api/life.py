"""Verbs as events of an export's life: one line in the log each, whatever the verb gives back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from glidefs.events import event
from glidefs.exports.requests import ExportStatus
from glidefs.exports.table import ExportTable

ALWAYS = frozenset(
    {"drain", "snapshot", "delete-snapshot", "tag", "make-base", "bless", "remove-base", "undelete"}
) | {
    "profile",
    "delete-log",
    "remove",
}
"""Verbs that do something without a change of their export's record."""


class Lives:
    """Wraps calls of the router. Thread-safe."""

    def __init__(self, table: Callable[[], ExportTable]) -> None:
        self._table = table

    def verb(self, verb: str, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A call that does ``verb`` to ``name``, as one that logs it. Done before, it is no event."""
        return partial(self._run, verb, name, partial(function, *args, **options))

    def _run(self, verb: str, name: str, call: Callable[[], Any]) -> Any:
        before = self._known(name)
        with event(verb, name, before[0]) as what:
            result = call()
            after = self._known(name)
            what.volume_id = after[0] or before[0]
            again = isinstance(result, dict) and result.get("created") is False
            what.silent = again or (verb not in ALWAYS and before == after)
            if isinstance(result, ExportStatus):
                what.detail = f"{result.transport}, {result.size} bytes"
                if result.state not in ("serving", "creating"):
                    what.detail = f"{result.state}: {result.reason}"
            elif isinstance(result, dict):
                what.detail = str(result.get("source") or result.get("note") or "")
        return result

    def _known(self, name: str) -> tuple[str, object, str]:
        """Volume id, record and state of an export, as of now."""
        entry = self._table().find(name)
        record = entry.record if entry is not None else None
        return (record.volume_id.hex() if record else ""), record, entry.state if entry else ""
