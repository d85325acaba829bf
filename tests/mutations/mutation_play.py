"""One case: copy the world, damage one thing, start, read everything, and judge what came of it.

Right are the data that the host or the store must have, or an error that names what was damaged. Everything
else is a violation: other data, older data without a word, an error that names nothing, a traceback, a wait
without end.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fork_rig import BLOCK, PREFIX, Node
from mutation_cases import (
    COLD,
    FILES,
    OBJECTS,
    OFFLINE,
    READ_THROUGH,
    Case,
    Struck,
    strike_files,
    strike_store,
)
from mutation_world import SECTOR, Image, World, copy_tree, forget, restored, start_node

from glidefs.config import StoreSettings
from glidefs.core.check import CoreError
from glidefs.daemon.store_check import StoreCheck
from glidefs.errors import GlideError
from glidefs.exports.logs.verbs import LogVerbs
from glidefs.exports.requests import AttachRequest
from glidefs.exports.table import ExportTable, RecordDirectory
from glidefs.formats.manifest import decode_root
from glidefs.gc.run import collect
from glidefs.names import parse_source
from glidefs.offline.export import export_image
from glidefs.offline.reader import BlockReader
from glidefs.store.base import ObjectStore
from glidefs.store.checked import get_checked
from glidefs.store.memory import MemoryStore
from glidefs.volume.volume import DrainTimeout

PATIENCE = 60.0
"""Seconds until something that takes milliseconds is called a hang; the machine may be busy."""

WITHOUT_A_STORE = 0.5
"""The same where the store is not the one that is meant: reads and verbs wait for it, and there are many."""

NEWS = 20.0
"""Seconds until a line that says why something failed is missing."""


class Violation(AssertionError):
    """What came of a case is not allowed."""


class Lines(logging.Handler):
    """What the project logs while a case runs, and the exceptions that threads die of."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self.tracebacks: list[str] = []
        self.said = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.said.set()
        if record.exc_info and record.exc_info[0] is not None:
            self.tracebacks.append(f"{record.getMessage()}: {record.exc_info[1]!r}")

    def died(self, args: Any) -> None:
        """For ``threading.excepthook``."""
        self.tracebacks.append(f"thread {args.thread.name if args.thread else '?'}: {args.exc_value!r}")


@contextmanager
def listening() -> Iterator[Lines]:
    """Collect the lines of everybody."""
    lines, logger, hook = Lines(), logging.getLogger("glidefs"), threading.excepthook
    level, spread = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(lines)
    threading.excepthook = lines.died
    try:
        yield lines
    finally:
        threading.excepthook = hook
        logger.removeHandler(lines)
        logger.setLevel(level)
        logger.propagate = spread


class Play:
    """The run of one case; ``errors`` are those that named what was damaged."""

    def __init__(self, world: World, case: Case, tmp: Path, lines: Lines) -> None:
        self.world = world
        self.case = case
        self.tmp = tmp
        self.lines = lines
        self.home = tmp / "home"
        self.memory: MemoryStore = restored(world.objects)
        self.errors: list[str] = []
        self.drained: set[str] = set()
        """Exports of which the store must have everything."""
        self.struck = Struck("", (), "")

    def run(self) -> str:
        """ "right", or the first error that names what was damaged. Raises Violation."""
        if self.case.start != COLD:
            copy_tree(self.world.home, self.home)
        if self.case.kind in OBJECTS:
            self.struck = strike_store(self.world, self.case, self.memory, self.tmp)
        else:
            self.struck = strike_files(self.world, self.case, self.home)
        if self.case.start == OFFLINE:
            self._offline()
        elif self.case.kind == "store id":
            with patch("glidefs.exports.router.VERB_PATIENCE", WITHOUT_A_STORE):
                self._started()
        else:
            self._started()
        if self.lines.tracebacks:
            self._wrong(f"a traceback: {self.lines.tracebacks[0]}")
        return self.errors[0] if self.errors else "right"

    # -- judging -------------------------------------------------------------------------------

    def _wrong(self, what: str) -> None:
        said = "\n  ".join(self.lines.lines[-12:])
        raise Violation(f"{self.case} ({self.struck.target}): {what}\n  {said}")

    def _names_log(self, line: str) -> bool:
        (volume,) = (volume for volume, of in self.world.volumes.items() if of == self.struck.export)
        return f"'glidefs logs export {volume} " in line

    def _names(self, text: str) -> bool:
        return any(name in text for name in self.struck.names)

    def _error(self, what: str, text: str) -> None:
        """An error is right if it names what was damaged, by itself or in the log."""
        until = time.monotonic() + NEWS
        while not self._names(text) and not any(map(self._names, self.lines.lines)):
            if time.monotonic() < until:
                self.lines.said.wait(0.1)  # events of the core are said by a thread of their own
                self.lines.said.clear()
                continue
            self._wrong(f"{what}: an error that does not name it: {text}")
        self.errors.append(text)

    def _try(self, what: str, act: Callable[[], Any]) -> Any:
        """What ``act`` returns, or None where it failed as it may."""
        try:
            return act()
        except GlideError as error:
            self._error(what, str(error))
        return None

    def _compare(self, what: str, read: Callable[[int, int], bytes], *images: Image) -> None:
        """Read all places; each must be as in one of the images, the same for all."""
        wrong: list[str] = []
        for image in images:
            wrong = []
            for at, want in image.places.items():
                try:
                    found = read(at, len(want))
                except CoreError as error:
                    if error.errno != errno.EIO:
                        self._wrong(f"{what}: {error}")
                    self._error(what, f"{what} at {at}: {error}")
                    continue
                if found != want:
                    first = next(i for i in range(len(want)) if found[i] != want[i])
                    wrong.append(f"{what} reads other data at {at + first}")
            if not wrong:
                return
        self._wrong("; ".join(wrong))

    def _stored(self, source: str) -> list[Image]:
        """What a source may be for those who know the store alone: older, where its root is older."""
        images = [self.world.stored[source]]
        if self._is_older(source):
            images.append(self.world.before[source])
        return images

    def _is_older(self, source: str) -> bool:
        return self.case.mutation == "older" and self.struck.target == parse_source(source).key(PREFIX)

    # -- starts ----------------------------------------------------------------------------------

    def _started(self) -> None:
        if self.case.start == READ_THROUGH:
            for file in ("blocks.index", "blocks.data"):
                (self.home / "blocks" / file).unlink()
        try:
            # A cold start has no store that it means: it works with this one, or not at all.
            without = self.case.kind == "store id" and self.case.start != COLD
            patience = WITHOUT_A_STORE if without else PATIENCE
            node = start_node(self.home, self.memory, read_timeout_ms=int(patience * 1000))
        except (GlideError, OSError) as error:
            self._error("start", str(error))
            return
        try:
            self._probe(node)
            if self.case.start == COLD:
                self._attach(node)
            else:
                node.router.start()
                if not node.router.wait_tried(PATIENCE):
                    self._wrong("exports are still being opened: a hang")
                self._exports(node)
            self._copies(node)
            self._drain(node)
        finally:
            node.stopping.set()
            node.close()
        self._look_offline(self.case.start != COLD)

    def _probe(self, node: Node) -> None:
        check = StoreCheck(
            node.store, StoreSettings(url="memory://"), self.home / "store-probed", node.stopping
        )
        self._try("probe", lambda: check.run(has_exports=self.case.start != COLD))

    def _attach(self, node: Node) -> None:
        for name in self.world.images:
            if name not in self.world.stored:
                continue
            wanted = AttachRequest(take_over=True, transport="nbd")
            status = self._try(f"attach {name}", lambda n=name, w=wanted: node.router.attach(n, w))
            if status is not None:
                self._export(node, name, *self._stored(name))

    def _exports(self, node: Node) -> None:
        listed = {status.name for status in node.router.listing()}
        for name, image in self.world.images.items():
            if name in listed:
                self._export(node, name, image)
            else:
                self._lost(node, name)

    def _export(self, node: Node, name: str, *images: Image) -> None:
        status = node.router.show(name)
        if status.state != "serving":
            self._error(f"{name} is {status.state}", status.reason)
            if (self.case.kind, self.case.mutation) != ("export record", "absence"):
                return
            node.router.attach(name, AttachRequest(transport="nbd"))  # as the message says
        self._compare(name, node.core(name).pread, *images)

    def _lost(self, node: Node, name: str) -> None:
        """No record: its log is offered, and an attach that was not told to does not serve older data."""
        if self.case.kind != "export record":
            self._wrong(f"{name} is not listed")
        # Of a fork that the store does not know its record alone has the root: the log can be exported only.
        logs = {log["volume_id"] for log in node.router.logs.list() if log["state"] == "record lost"}
        ids = {volume for volume, of in self.world.volumes.items() if of == name}
        if not ids & logs:
            self._wrong(f"{name} has no record, and its log is not listed with that state")
        if name not in self.world.stored and not any(map(self._names_log, self.lines.lines)):
            self._wrong(f"{name} has no record, and a start does not say so")
        self.errors.append(f"{name} has no record; its log is listed")

    def _copies(self, node: Node) -> None:
        """Forks of what is copied: they read as their source."""
        sources = {"tag": ("tag:t", "tag:u"), "base manifest": ("base:deb", "base:ubu")}
        sources["hot set"] = sources["base manifest"]
        sources["snapshot"] = tuple(source for source in self.world.stored if "@" in source)
        for number, source in enumerate(sources.get(self.case.kind, ())):
            name = f"copy{number}"
            status = self._try(f"fork of {source}", lambda n=name, s=source: node.fork(n, s))
            if status is not None:
                self._compare(name, node.core(name).pread, *self._stored(source))

    def _drain(self, node: Node) -> None:
        """What can be uploaded is; what waits says why."""
        for name in list(self.world.images):
            if node.router.table.find(name) is None or node.router.show(name).state != "serving":
                continue
            until = time.monotonic() + PATIENCE
            while True:
                try:
                    node.router.drain(name, 0.5)
                except DrainTimeout as error:
                    if any(map(self._names, self.lines.lines)):
                        self.errors.append(str(error))
                    elif time.monotonic() < until:
                        continue
                    else:
                        self._wrong(f"drain of {name} waits without a word: a hang")
                except GlideError as error:
                    self._error(f"drain of {name}", str(error))
                else:
                    self.drained.add(name)
                break

    # -- offline ---------------------------------------------------------------------------------

    def _offline(self) -> None:
        if self.case.kind in FILES:
            self._logs()
            return
        self._look_offline(False)
        self._collect()
        self._look_offline(False)

    def _look_offline(self, served: bool) -> None:
        """Read every source of the store, one of them as a whole image."""
        sources = [*self.world.stored, *(["h"] if "h" in self.drained else [])]
        narrow = [name for name in sources if not name.startswith("wide")]
        whole = self.case.random().choice(narrow) if self.case.start == OFFLINE else ""
        for source in sources:
            images = [self.world.images[source]] if served and source in self.drained else []
            if self._is_older(source) and any(map(self._names, self.lines.lines)):
                images.append(self.world.before[source])  # it stays so, and was said
            if not images:
                images = self._stored(source)
                if source in self.world.images:
                    images.append(self.world.images[source])  # uploaded in the background
            if source == whole or self.struck.target == parse_source(source).key(PREFIX):
                target = self.tmp / "image"
                act = partial(export_image, self.memory, PREFIX, source, target, force=True)
                if self._try(f"export of {source}", act) is not None:
                    self._compare_file(f"export of {source}", target, *images)
            else:
                self._try(f"blocks of {source}", partial(self._compare_blocks, source, *images))

    def _compare_blocks(self, source: str, *images: Image) -> None:
        """As an export reads, only the places. Raises GlideError."""
        key = parse_source(source).key(PREFIX)
        root, _ = get_checked(self.memory, key, decode_root)
        reader = BlockReader(self.memory, PREFIX, root)
        self._compare(source, lambda at, length: bytes(reader.read(at // BLOCK, length // BLOCK)), *images)

    def _compare_file(self, what: str, target: Path, *images: Image) -> None:
        fd = os.open(target, os.O_RDONLY)
        try:
            self._compare(what, lambda at, length: os.pread(fd, length, at), *images)
        finally:
            os.close(fd)
            target.unlink()

    def _collect(self) -> None:
        """gc with no grace: whatever it makes of the damage, it deletes nothing that others need."""
        store: ObjectStore = self.memory
        self._try("gc", lambda: collect(store, PREFIX, grace=0.0))

    def _logs(self) -> None:
        """The log over the image of its volume: all, or an error; then what is whole, and what is lost."""
        home, name = self.home, self.struck.export
        (volume,) = (volume for volume, of in self.world.volumes.items() if of == name)
        (log,) = (path for path in (home / "logs" / volume).iterdir() if path.is_dir())
        verbs = LogVerbs(RecordDirectory(home / "exports"), ExportTable(), home / "logs", home / "state")
        source = name if name in self.world.stored else "base:deb"
        target, what = self.tmp / "image", f"log of {name} over its image"
        export_image(self.memory, PREFIX, source, target, force=True)
        before = target.stat().st_mtime_ns
        if self._try(what, lambda: verbs.export(volume, log.name, str(target))) is not None:
            self._compare_file(what, target, self.world.images[name])
            return
        if target.stat().st_mtime_ns != before:
            self._wrong(f"{what}: refused, and something was written")
        result = verbs.export(volume, log.name, str(target), partial=True)
        if not self._names(result["note"]):
            self._wrong(f"{what}: what is lost is not said: {result['note']}")
        self._compare_whole(what, target, result)

    def _compare_whole(self, what: str, target: Path, result: dict[str, Any]) -> None:
        """What is left of a log over an image: right, but where it says that it lost something.

        Of lost data it knows the place; where it does not, there may be what was there before.
        """
        image = self.world.images[self.struck.export]
        known = all(loss["kind"] == "record" for loss in result["lost"]["losses"])
        lost = {at for first, count in result["lost"]["sectors"] for at in range(first, first + count)}
        with target.open("rb") as file:
            for place, data in image.places.items():
                file.seek(place)
                for i in range(0, len(data), SECTOR):
                    found, sector = file.read(SECTOR), (place + i) // SECTOR
                    right = found == data[i : i + SECTOR] or (not known and found in image.sectors)
                    if not right and not (sector in lost and found in image.sectors):
                        self._wrong(f"{what} has other data at {place + i}, and does not say so")


def play(world: World, case: Case, tmp: Path) -> str:
    """Run one case in the directory ``tmp``, which is deleted. Raises Violation."""
    tmp.mkdir()
    try:
        with listening() as lines:
            return Play(world, case, tmp, lines).run()
    except Violation:
        raise
    except Exception as error:
        raise Violation(f"{case}: {error!r}") from error
    finally:
        forget(tmp)
