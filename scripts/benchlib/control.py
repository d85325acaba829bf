"""The control plane with many exports: `list`, `/metrics`, and a start. The times are absolute."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

from benchlib.common import MIB, PATIENCE, BenchError, Settings, say
from benchlib.report import Report
from benchlib.targets import METRICS_AGE, GlideFS

SOME, MANY = 1000, 3000


def run(settings: Settings) -> Report:
    """Measure. Raises BenchError."""
    report = Report("control")
    with contextlib.ExitStack() as stack:
        glide = GlideFS(settings.work)
        stack.callback(glide.stop)
        glide.start()
        lists(report, settings, glide, "list", 0.09)
        some, many = (50, 150) if settings.short else (SOME, MANY)
        say(f"control: making {many} exports")
        make(glide, some)
        lists(report, settings, glide, f"list of {SOME:,}", 0.15)
        make(glide, many - some)
        scrapes(report, settings, glide)
        for number in range(settings.rounds):
            say(f"control: start {number + 1} of {settings.rounds}")
            glide.stop()
            began = time.monotonic()
            glide.start()
            wait_serving(glide, many)
            report.add(f"start of {MANY:,}", glide.name, "s until all are served", time.monotonic() - began)
    report.want(f"start of {MANY:,}", glide.name, "s until all are served", 2.0)
    return report


def make(glide: GlideFS, count: int) -> None:
    """More exports, over NBD, which needs nothing for each."""
    name = f"e{time.monotonic_ns()}-{{}}"
    glide.command("create", name, "--count", str(count), "--size", str(64 * MIB), "--transport", "nbd")


def lists(report: Report, settings: Settings, glide: GlideFS, load: str, goal: float) -> None:
    """The command as an operator runs it, with all that Python takes to begin."""
    command = [sys.executable, "-m", "glidefs", "list"]
    for _ in range(settings.rounds + 1):  # the first finds nothing in the page cache
        began = time.monotonic()
        done = subprocess.run(command, env={**os.environ, **glide.env}, capture_output=True, check=False)
        took = time.monotonic() - began
        if done.returncode:
            raise BenchError(f"list: {done.stderr.decode().strip()}")
        report.add(load, glide.name, "s", took)
    report.want(load, glide.name, "s", goal)


def scrapes(report: Report, settings: Settings, glide: GlideFS) -> None:
    """GET /metrics, no sooner than its answer is made anew."""
    load = f"/metrics of {MANY:,}"
    for _ in range(settings.rounds):
        time.sleep(METRICS_AGE)
        began = time.monotonic()
        glide.metrics()
        report.add(load, glide.name, "s", time.monotonic() - began)
    report.want(load, glide.name, "s", 0.15)


def wait_serving(glide: GlideFS, count: int) -> None:
    """Until so many are served."""
    deadline = time.monotonic() + PATIENCE
    while (served := glide.health()["exports"].get("serving", 0)) < count:
        if time.monotonic() > deadline:
            raise BenchError(f"{served} of {count} exports are served")
        time.sleep(0.1)
