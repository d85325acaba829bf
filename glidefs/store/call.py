"""One call of a lane of :mod:`glidefs.store.resilient`."""

from __future__ import annotations

import time
from typing import Final, Literal

from glidefs.errors import StoreError, StoreUnavailable
from glidefs.store.breaker import Breaker
from glidefs.store.state import Waits, waiting

Kind = Literal["read", "upload", "background"]
_LOOK: Final = 1.0
"""Seconds after which who waits looks at the clock."""


class Call:
    """One call of a lane: its deadline, and what became of its attempts."""

    __slots__ = ("key", "kind", "last", "op", "sent", "until")

    def __init__(self, kind: Kind, op: str, key: str, until: float | None, sent: int) -> None:
        self.kind = kind
        self.op = op
        self.key = key
        self.until = until
        self.sent = sent
        self.last: StoreError | None = None

    def waits(self, waits: Waits, why: str) -> None:
        """It has no answer so far, for its last error or else for ``why``."""
        reason = self.last.why if self.last is not None else why
        waits.failed(waiting(self.kind, self.op, self.key), reason)

    def is_over(self) -> bool:
        """Whether its deadline passed."""
        return self.until is not None and time.monotonic() >= self.until

    def look(self) -> float:
        """When to look at the clock again, at its deadline at the latest."""
        then = time.monotonic() + _LOOK
        return then if self.until is None else min(then, self.until)

    def failed(self, error: StoreError) -> None:
        """Note a failed attempt. A put without an answer may be done; so what follows it is ambiguous."""
        if self.op == "put" and (error.temporary or self.last is not None):
            error.ambiguous = True
        self.last = error

    def error(self, why: str) -> StoreUnavailable:
        """The error of a call that ended while it waited."""
        if self.last is not None:
            why = f"{why}; last error: {self.last.why}"
        return StoreUnavailable(
            why, key=self.key, op=self.op, ambiguous=self.last is not None and self.op == "put"
        )

    def gave_up(self, breaker: Breaker) -> StoreUnavailable:
        """The error of a call whose deadline passed."""
        if breaker.is_closed:
            return self.error("the deadline passed")
        return self.error(f"the deadline passed; the store has been down for {breaker.open_for:.0f} s")
