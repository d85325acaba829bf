"""Prometheus' text format, version 0.0.4: a thousand exports are thirty thousand lines, which must be cheap.

A line costs one formatted string here; the labels of an export are escaped once for all its lines.
"""

from __future__ import annotations

from collections.abc import Iterable

Sample = tuple[str, float]
"""Labels as :func:`labels` writes them, and the value."""


def labels(**values: str) -> str:
    """``{name="value",...}``, escaped; empty without any."""
    return "{" + ",".join([f'{name}="{_escaped(value)}"' for name, value in values.items()]) + "}"


def and_label(of: str, name: str, value: str) -> str:
    """Labels that :func:`labels` wrote, or none, and one more, whose value needs no escape."""
    return f'{of[:-1]},{name}="{value}"}}' if of else f'{{{name}="{value}"}}'


def gauge(name: str, text: str, samples: Iterable[Sample]) -> str:
    """A family of gauges with at least its HELP and TYPE; ``name`` without the prefix."""
    name = f"glidefs_{name}"
    return _head(name, "gauge", text) + "".join([f"{name}{of} {value}\n" for of, value in samples])


def counter(name: str, text: str, samples: Iterable[Sample]) -> str:
    """The same of counters, whose names get their ending here."""
    name = f"glidefs_{name}_total"
    return _head(name, "counter", text) + "".join([f"{name}{of} {value}\n" for of, value in samples])


def histogram(name: str, text: str, samples: Iterable[tuple[str, list[tuple[str, float]], float]]) -> str:
    """A family of histograms: labels, cumulative counts by upper bound (the last one "+Inf"), and the sum."""
    name = f"glidefs_{name}"
    lines = [_head(name, "histogram", text)]
    for of, buckets, total in samples:
        within = of[:-1] + "," if of else "{"
        lines += [f'{name}_bucket{within}le="{bound}"}} {count}\n' for bound, count in buckets]
        lines.append(f"{name}_count{of} {buckets[-1][1]}\n{name}_sum{of} {total}\n")
    return "".join(lines)


def _head(name: str, kind: str, text: str) -> str:
    return f"# HELP {name} {_one_line(text)}\n# TYPE {name} {kind}\n"


def _one_line(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _escaped(text: str) -> str:
    return _one_line(text).replace('"', r"\"") if not text.isalnum() else text
