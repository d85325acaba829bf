"""What a span is, where spans go, and the stages of something that is under way.

There is no sink where nothing is configured: who would make spans has None then, and does nothing for them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final, Protocol

from msgspec import Struct

Value = str | int | float | bool
ERROR: Final = "error.type"
"""The attribute with the name of an error, as OpenTelemetry has it."""


class Span(Struct, frozen=True, kw_only=True):
    """Something that is over. ``begin`` and ``end`` are unix nanoseconds; ``children`` are parts of it.

    It failed if it has the attribute :data:`ERROR`. ``answers``: it is the answer to a request, with these
    header fields of W3C Trace Context (``traceparent``, ``tracestate``); None: to none.
    """

    name: str
    begin: int
    end: int
    attributes: Mapping[str, Value] = {}
    children: tuple[Span, ...] = ()
    answers: Mapping[str, str] | None = None


class Sink(Protocol):
    """Where spans go."""

    def put(self, span: Span) -> None:
        """Take a span. Any thread; never waits, never raises."""
        ...


class Stages:
    """What something under way goes through: a stage begins where the one before it ends. Not thread-safe.

    ``begin`` is when the first one did. Times are nanoseconds of ``time.monotonic_ns()``. ``gets`` and
    ``bytes`` are counted by who fetches; ``error`` is the name of what failed all of it.
    """

    __slots__ = ("_error", "_name", "_past", "_since", "begin", "bytes", "error", "gets")

    def __init__(self, stage: str) -> None:
        self.begin = self._since = time.monotonic_ns()
        self.gets = self.bytes = 0
        self.error = self._error = ""
        self._name = stage
        self._past: tuple[tuple[str, int, str], ...] = ()
        """Of each stage that is over: name, begin, error."""

    def __lt__(self, other: Stages) -> bool:
        """Whether it began before: tuples that hold one can be sorted."""
        return self.begin < other.begin

    def fork(self) -> Stages:
        """The same until now, for a part that goes its own way from here on."""
        other = object.__new__(Stages)
        other.begin, other._since = self.begin, self._since
        other.gets, other.bytes = self.gets, self.bytes
        other.error, other._error = self.error, self._error
        other._name, other._past = self._name, self._past
        return other

    def enter(self, stage: str, at: int | None = None) -> None:
        """The stage that it is in ends and ``stage`` begins: now, or ``at`` a time that has passed."""
        self._past = (*self._past, (self._name, self._since, self._error))
        self._since = time.monotonic_ns() if at is None else max(at, self._since)
        self._name, self._error = stage, ""

    def was(self, stage: str) -> None:
        """The stage that it is in has been ``stage`` since it began."""
        self._name = stage

    def fail(self, error: BaseException | str) -> None:
        """The stage that it is in fails; another attempt may follow."""
        self._error = error if isinstance(error, str) else type(error).__name__

    def give_up(self, error: BaseException) -> None:
        """The stage that it is in fails, and with it all."""
        self.fail(error)
        self.error = self._error

    def span(self, name: str, attributes: Mapping[str, Value]) -> Span:
        """All of it, as a span that ends now."""
        until = time.monotonic_ns()
        to_unix = time.time_ns() - until
        stages = (*self._past, (self._name, self._since, self._error))
        ends = (*(since for _, since, _ in stages[1:]), until)
        return Span(
            name=name,
            begin=self.begin + to_unix,
            end=until + to_unix,
            attributes={**attributes, **_failure(self.error)},
            children=tuple(
                Span(name=stage, begin=since + to_unix, end=end + to_unix, attributes=_failure(error))
                for (stage, since, error), end in zip(stages, ends, strict=True)
            ),
        )


def _failure(error: str) -> dict[str, Value]:
    return {ERROR: error} if error else {}
