"""Results: a table on stdout, a JSON file, a plot."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchlib.common import ROOT, median, say


@dataclass
class Figure:
    """One load on one server: a value per round, larger is better unless `unit` is a cost."""

    load: str
    server: str
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of all rounds."""
        return median(self.values)


@dataclass
class Ratio:
    """Medians compared. `goal` is the least that is wanted, or the most if `most`."""

    load: str
    against: str
    what: str
    value: float
    goal: float | None = None
    most: bool = False

    @property
    def met(self) -> bool | None:
        """None where there is no goal."""
        if self.goal is None or math.isnan(self.value):
            return None
        return self.value <= self.goal if self.most else self.value >= self.goal


@dataclass
class Report:
    """All of a section."""

    section: str
    figures: list[Figure] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, load: str, server: str, unit: str, value: float) -> None:
        """One more round."""
        for figure in self.figures:
            if (figure.load, figure.server, figure.unit) == (load, server, unit):
                figure.values.append(value)
                return
        self.figures.append(Figure(load, server, unit, [value]))

    def get(self, load: str, server: str, unit: str) -> float:
        """The median so far; NaN if there is none."""
        for figure in self.figures:
            if (figure.load, figure.server, figure.unit) == (load, server, unit):
                return figure.median
        return math.nan

    def compare(
        self, load: str, ours: str, other: str, unit: str, goal: float | None = None, *, most: bool = False
    ) -> None:
        """Ratio of the medians of two servers."""
        base = self.get(load, other, unit)
        value = self.get(load, ours, unit) / base if base else math.nan
        self.ratios.append(Ratio(load, other, unit, value, goal, most))

    def want(self, load: str, ours: str, unit: str, goal: float, *, most: bool = True) -> None:
        """A goal for a figure as it is: the most that it may be, or the least."""
        self.ratios.append(Ratio(load, "-", unit, self.get(load, ours, unit), goal, most))

    @property
    def missed(self) -> list[Ratio]:
        """Ratios that are not what is wanted."""
        return [ratio for ratio in self.ratios if ratio.met is False]

    def print(self) -> None:
        """Tables for people."""
        rows = [
            [f.load, f.server, number(f.median), f.unit, f"{number(min(f.values))} - {number(max(f.values))}"]
            for f in self.figures
        ]
        print(f"\n{self.section}: medians\n")
        table(["load", "server", "median", "unit", "least - most"], rows)
        if self.ratios:
            print(f"\n{self.section}: GlideFS compared\n")
            marks = {True: "met", False: "MISSED", None: ""}
            compared = [
                [
                    r.load,
                    r.what,
                    r.against,
                    f"{r.value:.2f}",
                    "" if r.goal is None else f"{'<=' if r.most else '>='} {r.goal:.2f}",
                    marks[r.met],
                ]
                for r in self.ratios
            ]
            table(["load", "of", "against", "ratio", "goal", ""], compared)
        for note in self.notes:
            print(f"note: {note}")
        print(flush=True)

    def write(self, directory: Path) -> None:
        """`{section}.json` and, where matplotlib is installed, `{section}.png`."""
        directory.mkdir(parents=True, exist_ok=True)
        document = {
            "section": self.section,
            "machine": machine(),
            "figures": [{**asdict(f), "median": f.median} for f in self.figures],
            "ratios": [{**asdict(r), "met": r.met} for r in self.ratios],
            "notes": self.notes,
        }
        path = directory / f"{self.section}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        say(f"wrote {path}")
        plot(self, directory / f"{self.section}.png")


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
        "commit": commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def plot(report: Report, path: Path) -> None:
    """One panel per unit: a group of bars per load, a bar per server, least and most as whiskers."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        say(f"no plot: matplotlib is not installed ({path.name} is left out)")
        return
    units = list(dict.fromkeys(f.unit for f in report.figures))
    grid, axes = pyplot.subplots(len(units), 1, figsize=(11, 3.6 * len(units)), squeeze=False)
    for axis, unit in zip(axes[:, 0], units, strict=True):
        loads = list(dict.fromkeys(f.load for f in report.figures if f.unit == unit))
        servers = list(dict.fromkeys(f.server for f in report.figures if f.unit == unit))
        width = 0.8 / len(servers)
        for i, server in enumerate(servers):
            found = {f.load: f for f in report.figures if f.unit == unit and f.server == server}
            at = [n + i * width for n, load in enumerate(loads) if load in found]
            bars = [found[load] for load in loads if load in found]
            if not bars:
                continue
            spread = [
                [f.median - min(f.values) for f in bars],
                [max(f.values) - f.median for f in bars],
            ]
            axis.bar(at, [f.median for f in bars], width, yerr=spread, capsize=2, label=server)
        axis.set_xticks([n + 0.4 - width / 2 for n in range(len(loads))], labels(loads), fontsize=7)
        axis.set_ylabel(unit)
        axis.legend(fontsize=7)
    grid.suptitle(f"GlideFS: {report.section} (median, least and most)")
    grid.tight_layout(rect=(0, 0, 1, 0.98))
    grid.savefig(path, dpi=110)
    pyplot.close(grid)
    say(f"wrote {path}")


def labels(loads: Sequence[str]) -> list[str]:
    """Names of loads in lines short enough to stand side by side."""
    return ["\n".join(textwrap.wrap(load, 18)) for load in loads]
