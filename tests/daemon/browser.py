"""A headless Chromium for tests, driven over its DevTools pipe: JSON documents, each ended by a NUL."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
PATIENCE = 120.0
CATEGORIES = ["toplevel", "devtools.timeline", "disabled-by-default-devtools.timeline"]
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--window-size=1360,1250",
    "--remote-debugging-pipe",
)


class Page:
    """One tab. ``asked`` and ``said`` collect the addresses that it fetched and what its console has."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._ids = itertools.count(1)
        self._rest = b""
        self._session = ""
        self.asked: list[str] = []
        self.said: list[str] = []
        self._loaded = 0
        self._events: list[dict[str, Any]] = []
        self._traced = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """A command and its answer; what happens meanwhile is noted."""
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            answer = self._next(until)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._back, 1 << 20)
            assert part, f"the browser ended with status {self._process.poll()}"
            self._rest += part
        found, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(found)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        method, given = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.asked.append(given["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded += 1
        elif method == "Tracing.dataCollected":
            self._events += given["value"]
        elif method == "Tracing.tracingComplete":
            self._traced = True
        elif method == "Runtime.exceptionThrown":
            self.said.append(json.dumps(given["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.said.append(given["entry"]["text"])

    def open(self, url: str) -> None:
        """Go there and wait until it is loaded."""
        before = self._loaded
        self.call("Page.navigate", url=url)
        until = time.monotonic() + PATIENCE
        while self._loaded == before:
            self._note(self._next(until))

    def value(self, expression: str) -> Any:
        """Of JavaScript, also of a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Until an expression is true; its value."""
        until = time.monotonic() + PATIENCE
        while not (value := self.value(expression)):
            assert time.monotonic() < until, f"timeout: {expression}: {self.text('body')}"
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        """What people see of an element."""
        return str(self.value(f"document.querySelector({json.dumps(selector)}).innerText"))

    @contextlib.contextmanager
    def tasks(self) -> Iterator[list[tuple[float, float]]]:
        """Of the block: milliseconds of CPU, and on the clock, of each task of the page's main thread."""
        found: list[tuple[float, float]] = []
        self._events = []
        self.call(
            "Tracing.start", transferMode="ReportEvents", traceConfig={"includedCategories": CATEGORIES}
        )
        yield found
        self.call("Tracing.end")
        until = time.monotonic() + PATIENCE
        while not self._traced:
            self._note(self._next(until))
        self._traced = False
        main = {
            (event["pid"], event["tid"])
            for event in self._events
            if event.get("name") == "thread_name" and event["args"].get("name") == "CrRendererMain"
        }
        found += [
            (event.get("tdur", event["dur"]) / 1e3, event["dur"] / 1e3)
            for event in self._events
            if event.get("name", "").endswith("RunTask")
            and event["ph"] == "X"
            and (event["pid"], event["tid"]) in main
        ]
        assert found, "the browser traced no task"

    def dark(self, on: bool) -> None:
        """What the system prefers."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def shot(self, path: Path) -> None:
        """A picture of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with one tab, and a profile of its own."""
    (its_input, to), (back, its_output) = os.pipe(), os.pipe()
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    script = f'exec "$@" 3<&{its_input} 4>&{its_output}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *command],
        pass_fds=(its_input, its_output),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(profile), "XDG_RUNTIME_DIR": str(profile)},
    )
    os.close(its_input)
    os.close(its_output)
    try:
        page = Page(process, to, back)
        yield page
        with contextlib.suppress(AssertionError, OSError):
            page._session = ""
            page.call("Browser.close")
    finally:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to)
        os.close(back)
