"""What the store and every node of a simulation must hold: the byte model.

A *life* is one log of a volume on one node, from the attach, create or fork that drew its id until another
log is named, or none is. A cloned host has *twins* of its lives: the same logs, which go on apart. The
``History`` of a life (tests/model/history.py) has the versions of each hot sector. The model sees every
version of every root that the store ever had, in order (``observe``), and asks of each whether somebody may
have put it, and whether what it names holds what it may: read by the formats alone.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import NamedTuple

import msgspec
from fork_model import AREAS, SMALL, hot
from fork_rig import PREFIX
from gc_rig import ClockStore
from history import FIRST, SECTOR, ZERO, History, Span, Version
from sim_clock import Clock
from stored import Stored

from glidefs.formats.manifest import NO_ID, Root, decode_root
from glidefs.names import manifest_key
from glidefs.store.base import Body, ObjectInfo, join_body

NEVER = 1 << 60
"""The end of an operation that nobody saw end."""
BORN = Span(FIRST, FIRST, 0, 0)

Content = dict[int, bytes]
"""Hot sectors; what is not in it is zero."""


class Change(NamedTuple):
    """What happened to a root: ``data`` is None for a delete, ``who`` the node that asked for it."""

    key: str
    data: bytes | None
    etag: str | None
    who: str


class SimStore(ClockStore):
    """The one store of all nodes. ``log`` has what happened to roots, ``kept`` all packs and pages ever."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.by = ""
        """Whose request is under way."""
        self.log: list[Change] = []
        self.kept: dict[str, bytes] = {}
        now = clock.now
        super().__init__()
        clock.now = now

    @property
    def now(self) -> float:
        return self.clock.now

    @now.setter
    def now(self, seconds: float) -> None:
        self.clock.now = seconds

    def put(self, key: str, data: Body, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        body = join_body(data)
        etag = super().put(key, body, if_match=if_match, if_none_match=if_none_match)
        if _is_root(key):
            self.log.append(Change(key, body, etag, self.by))
        elif "/packs/" in key or "/pages/" in key:
            self.kept[key] = body
        return etag

    def objects(self) -> dict[str, tuple[bytes, ObjectInfo]]:
        """Everything that is in it."""
        return dict(self._objects)

    def restore(self, key: str, data: bytes, etag: str | None) -> None:
        """What an administrator puts in the place of an object: it is no request of any node."""
        super().put(key, data)
        if etag is not None:
            info = msgspec.structs.replace(self._objects[key][1], etag=etag)
            self._objects[key] = (data, info)

    def delete(self, key: str) -> None:
        if _is_root(key) and self.etag_of(key) is not None:
            self.log.append(Change(key, None, None, self.by))
        super().delete(key)


def _is_root(key: str) -> bool:
    match key.split("/"):
        case [_, "tags", name]:
            return not name.startswith(".")  # a pin, of which the copy itself is checked
        case [_, "volumes", _, "manifest"] | [_, "volumes", _, "snapshots", _]:
            return True
        case [_, "bases", _, "manifest"]:
            return True
    return False


class Origin(NamedTuple):
    """What a copy may hold: ``content``, or what the root ``key`` held at its version ``since`` or later."""

    content: Content | None
    key: str = ""
    since: int = 0


class Seen(NamedTuple):
    """A version of a root, what it said that the hot sectors hold, and its bytes and ETag in the store."""

    root: Root
    content: Content
    data: bytes
    etag: str | None


def must(condition: object, why: str) -> None:
    """What has to hold. Raises AssertionError."""
    if not condition:
        raise AssertionError(why)


def same(one: Content, other: Content) -> bool:
    return all(one.get(sector, ZERO) == other.get(sector, ZERO) for sector in one.keys() | other.keys())


def show(content: bytes) -> str:
    """The tag of each 512 bytes that differ from those before."""
    shown: list[str] = []
    before = -1
    for at in range(0, len(content), 512):
        tag, place = (int.from_bytes(content[at + i : at + i + 4], "little") for i in (0, 4))
        shown += [f"{tag}.{place}"] if tag != before else []
        before = tag
    return " ".join(shown)


class Life:
    """One log of a volume."""

    def __init__(self, root: Root, node: str, size: int, content: Content, now: float) -> None:
        self.name = root.name
        self.log_id = root.log_id
        self.volume_id = root.volume_id
        self.node = node
        self.size = size
        self.flush = root.flush
        self.born = now
        self.base = content
        ends = size // SECTOR
        areas = [(first, min(count, ends - first)) for first, count in AREAS if first < ends]
        self.history = History(areas, {})
        for sector in self.history.versions:
            self.history.pin(sector, content.get(sector, ZERO))
        self.flushes: list[tuple[int, int]] = []
        self.known_from = 0
        self.pending: dict[int, Version] = {}
        """Of an operation that nobody saw end."""
        self.cut_at: int | None = None
        """When the power was cut, if nobody looked since."""
        self.unchecked = False
        """Whether a process died since somebody looked."""
        self.segment = 0
        """The last segment that the store has."""
        self.published = False
        self.stale = False
        """Another log is named, or none: it must not commit any more."""
        self.contested = False
        """Not published, and another volume has the name."""
        self.sync_failed = False
        self.outdone = False
        """A twin has committed: what is in the store is not this log's any more."""
        self.may_adopt = False
        """But that is made of what this log holds, too: its owner may find that out, and go on from it."""
        self.back = False
        """The store has an older root than the node: it must not commit."""

    def __str__(self) -> str:
        return f"{self.name}@{self.node}/{self.log_id.hex()[:6]}"

    @property
    def lost(self) -> bool:
        """Whether its owner may find out at any time that it is none."""
        return self.stale or self.contested

    def twin(self, node: str) -> Life:
        """The same life on a clone of its node."""
        twin = copy.deepcopy(self)
        twin.node, twin.unchecked = node, True
        return twin

    def now(self) -> Content:
        return {sector: self.history.now(sector) for sector in self.history.versions}

    # -- operations ------------------------------------------------------------------------------------

    def begin(self, span: Span, offset: int, data: bytes) -> None:
        """An operation starts; nobody may ever see it end."""
        old = {sector: len(versions) for sector, versions in self.history.versions.items()}
        self.history.write(Span(span.start, NEVER, span.low, NEVER), offset, data)
        self._take_back(old)

    def begin_zero(self, span: Span, offset: int, length: int) -> None:
        old = {sector: len(versions) for sector, versions in self.history.versions.items()}
        self.history.zero(Span(span.start, NEVER, span.low, NEVER), offset, length)
        self._take_back(old)

    def _take_back(self, counts: dict[int, int]) -> None:
        for sector, count in counts.items():
            versions = self.history.versions[sector]
            if len(versions) > count:
                self.pending[sector] = versions[-1]
                del versions[count:]

    def end(self, end: int, high: int) -> None:
        """The operation under way is acknowledged."""
        for sector, version in self.pending.items():
            span = version.span._replace(end=end, high=high)
            self.history.versions[sector].append(version._replace(span=span))
        self.pending = {}

    # -- what may be -----------------------------------------------------------------------------------

    def in_commit(self, sector: int, segment: int) -> list[Version]:
        may = self.history.in_commit(sector, segment)
        pending = self.pending.get(sector)
        return [*may, pending] if pending is not None and pending.span.low <= segment else may

    def settle(self, found: Content, high: int) -> None:
        """After the death of a process everything acknowledged is there; of what was not, see what is."""
        for sector, content in found.items():
            pending = self.pending.get(sector)
            if content == self.history.now(sector):
                continue
            want = show(self.history.now(sector)) + (f" or {show(pending.content)}" if pending else "")
            if pending is None or content != pending.content:
                raise AssertionError(f"{self}: sector {sector} after a crash: {show(content)}, not {want}")
            span = pending.span._replace(high=high)
            self.history.versions[sector].append(pending._replace(span=span))
        self.pending = {}

    def settle_cut(self, found: Content, last_segment: int) -> None:
        """After a power cut all that was flushed or committed is there; sectors are old or new, not torn."""
        assert self.cut_at is not None
        for sector, content in found.items():
            may = self._after_cut(sector, self.cut_at)
            assert any(version.matches(content) for version in may), (
                f"{self}: sector {sector} after a power cut: {show(content)}, "
                f"not one of {[show(version.content) for version in may]}"
            )
            self.history.pin(sector, content)
        self.pending = {}
        self.flushes = []
        self.known_from = last_segment
        self.cut_at = None

    def _after_cut(self, sector: int, at: int) -> list[Version]:
        versions = self.history.versions[sector]
        flushed = max((begin for begin, end in self.flushes if end <= at), default=FIRST)
        low = max(
            i
            for i, version in enumerate(versions)
            if version.span.end <= flushed or version.span.high <= self.segment
        )
        may = [versions[low], *(version for version in versions[low + 1 :] if version.span.start < at)]
        pending = self.pending.get(sector)
        return [*may, pending] if pending is not None else may


class Model:
    """Everything that verbs may bring about is said to it before they begin; ``observe`` then looks."""

    def __init__(self, store: SimStore) -> None:
        self.store = store
        self.stored = Stored(store)
        self.lives: dict[tuple[bytes, str], Life] = {}
        """By log id and node."""
        self.roots: dict[str, Seen] = {}
        self.contents: defaultdict[str, list[Content]] = defaultdict(list)
        """Of each root, what its versions held."""
        self.origins: defaultdict[str, list[Origin]] = defaultdict(list)
        """What may be put under a key, or below a key that ends with a slash."""
        self.births: defaultdict[tuple[str, str], list[Origin]] = defaultdict(list)
        """What a volume that a node makes under a name may hold."""
        self.takers: set[tuple[str, str]] = set()
        self.accepters: set[tuple[str, str]] = set()
        """Who may take a volume from a store that went back."""
        self.leavers: set[tuple[str, str]] = set()
        self.removers: set[str] = set()
        self.undeleters: set[str] = set()
        self.making: dict[str, str] = {}
        """By node: the volume of its last create, unless that worked. It may take back what it put."""
        self.deleted: set[str] = set()
        """Keys that may be deleted."""
        self.sent: defaultdict[str, set[bytes]] = defaultdict(set)
        """What each node sent as a root, whatever came of it; of clones, what their node had sent, too."""
        self.told_by_log: set[bytes] = set()
        """What of that has a nonce that is made of the log: the disk took none."""
        self.versions: defaultdict[str, list[Seen]] = defaultdict(list)
        """Of each root, all that it was."""

    # -- what verbs say --------------------------------------------------------------------------------

    def origin(self, key: str) -> Origin:
        """What a root holds now, or will while a verb runs."""
        return Origin(None, key, max(0, len(self.contents[key]) - 1))

    def _matches(self, origins: list[Origin], content: Content) -> bool:
        for origin in origins:
            options = (
                [origin.content] if origin.content is not None else self.contents[origin.key][origin.since :]
            )
            if any(same(content, option) for option in options):
                return True
        return False

    # -- what happened ---------------------------------------------------------------------------------

    def observe(self) -> None:
        """Look at every version of every root since the last time."""
        log, self.store.log = self.store.log, []
        for key, data, etag, who in log:
            if data is None:
                self._delete(key)
                continue
            root = decode_root(key, data)
            before = self.roots.get(key)
            content = self.stored.contents(root, hot(max(root.size, SMALL)))
            self.show(key, Seen(root, content, data, etag))
            if key.endswith("/manifest") and "/volumes/" in key:
                self._manifest(key, before, root, content, who)
                self._outdone(root, content, data, who)
            else:
                self._copy(key, before, root, content)

    def show(self, key: str, seen: Seen) -> None:
        """The root is that now."""
        self.roots[key] = seen
        self.contents[key].append(seen.content)
        self.versions[key].append(seen)

    def _delete(self, key: str) -> None:
        before = self.roots.pop(key, None)
        assert before is not None
        assert key in self.deleted or before.root.removed_at, f"{key} was deleted"

    def _copy(self, key: str, before: Seen | None, root: Root, content: Content) -> None:
        """A snapshot, tag or base."""
        assert (root.log_id, root.owner_node) == (NO_ID, ""), f"{key} has an owner"
        if before is not None and root.removed_at:
            assert key in self.deleted, f"{key} was removed"
            assert same(content, before.content), f"{key}: the tombstone holds something else"
            return
        assert before is None or "/tags/" in key, f"{key} was replaced"
        below = key.rsplit("/", 1)[0] + "/"
        assert self._matches(self.origins[key] + self.origins[below], content), (
            f"{key} is no copy of its source"
        )

    def _outdone(self, root: Root, content: Content, data: bytes, who: str) -> None:
        """What one of several twins put is not the others', but what it had sent before it was cloned."""
        for twin in self.of_log(root.log_id):
            if data in self.sent[twin.node] or root.sequence == 0:  # the first root is the same of all
                if twin.cut_at is None:
                    twin.segment = max(twin.segment, root.last_segment)
                twin.published, twin.contested = True, False
            elif twin.node != who:
                twin.stale = twin.outdone = True
                twin.may_adopt = data in self.told_by_log and all(
                    any(version.matches(content.get(sector, ZERO)) for version in may)
                    for sector in twin.history.versions
                    for may in (twin.in_commit(sector, root.last_segment),)
                )

    def forget_log(self, node: str) -> None:
        """The power of a node is cut: of a root with no nonce on its disk the log may tell no more."""
        for life in self.lives.values():
            seen = self.named(life)
            if life.node == node and not life.stale and seen is not None and seen.data in self.told_by_log:
                life.stale = life.outdone = life.may_adopt = True

    def of_log(self, log_id: bytes) -> list[Life]:
        """The lives of a log: one, and its twins."""
        return [life for (one, _), life in self.lives.items() if one == log_id != NO_ID]

    def _manifest(self, key: str, before: Seen | None, root: Root, content: Content, who: str) -> None:
        name = root.name
        if before is not None and before.root.removed_at and root.removed_at:
            assert same(content, before.content), f"{key}: the tombstone holds something else"
            assert root.doomed, f"{key}: a tombstone was put again for nothing"
            return
        if before is not None and before.root.removed_at and root.log_id == NO_ID:
            self._undeleted(key, before, root, content)
            return
        if before is None or before.root.removed_at:
            self._first(root, content, who)
            return
        was = before.root
        assert root.volume_id == was.volume_id, f"{key} was replaced by another volume"
        assert root.sequence > was.sequence, f"{key}: sequence {root.sequence} after {was.sequence}"
        if root.log_id == was.log_id and root.log_id != NO_ID and not root.removed_at:
            self._commit(key, before, root, content, who)
            return
        assert same(content, before.content), f"{key}: an owner changed, and with it what it holds"
        mine = self.lives.get((was.log_id, who))
        owns = was.log_id == NO_ID or (mine is not None and (mine.may_adopt or not mine.outdone))
        for life in self.of_log(was.log_id):
            life.stale = True
        if root.removed_at:
            undone = was.sequence == 0 and self.making.get(who) == name
            assert undone or name in self.removers, f"{key} was removed"
            assert owns, f"{key} was removed by {who}, which does not have it"
        elif root.log_id == NO_ID:
            assert (who, name) in self.leavers, f"{key} was given up by {who}"
            assert owns, f"{key} was given up by {who}, which does not have it"
        else:
            assert (who, name) in self.takers, f"{key} was taken by {who}"
            unasked = mine is not None and mine.back and (who, name) not in self.accepters
            assert not unasked, f"{key}: {who} took what is older than what it had, unasked"
            assert not self.of_log(root.log_id), f"{key}: a log id was used again"
            self._born(Life(root, who, root.size, content, self.store.now), published=True)

    def _undeleted(self, key: str, before: Seen, root: Root, content: Content) -> None:
        """A tombstone is a volume again, that nobody serves."""
        assert root.name in self.undeleters, f"{key} was put back"
        assert not before.root.doomed, f"{key} was put back, and is about to be deleted"
        assert (root.volume_id, root.owner_node) == (before.root.volume_id, ""), f"{key} is another volume"
        assert same(content, before.content), f"{key}: what was put back is not what was removed"
        for life in self.lives.values():
            life.contested |= life.name == root.name and not life.published

    def _born(self, life: Life, *, published: bool) -> None:
        life.published = published
        self.lives[life.log_id, life.node] = life

    def _first(self, root: Root, content: Content, who: str) -> None:
        """The first root of a volume."""
        life = self.lives.get((root.log_id, who))
        if life is None:
            origins = self.births[who, root.name]
            assert self._matches(origins, content), f"{root.name} of {who} came from nowhere"
            life = Life(root, who, root.size, content, self.store.now)
            self._born(life, published=True)
        assert not life.stale, f"{life} is stale, and was put"
        assert same(content, life.base), f"{life}: its first root is not what it was made of"
        life.published, life.contested = True, False
        for other in self.lives.values():
            if other.name == root.name and other.log_id != life.log_id and not other.published:
                other.contested = True

    def _commit(self, key: str, before: Seen, root: Root, content: Content, who: str) -> None:
        life = self.lives[root.log_id, who]
        if life.may_adopt:
            life.stale = life.outdone = life.may_adopt = False
        assert not life.stale, f"{life} is stale, and committed"
        assert not life.back, f"{life} committed to a store that went back"
        assert root.last_segment >= before.root.last_segment, f"{key}: {before.root.last_segment} was there"
        if life.cut_at is not None:
            return  # its name was another's at the start: nobody has seen yet what a power cut left
        life.segment = root.last_segment
        if root.last_segment == before.root.last_segment:
            assert same(content, before.content), f"{key}: changed without a segment"
            return
        if root.last_segment < life.known_from:
            return  # of what a power cut left, only the end is known
        for sector in life.history.versions:
            got = content.get(sector, ZERO)
            may = life.in_commit(sector, root.last_segment)
            assert any(version.matches(got) for version in may), (
                f"{key}: sector {sector} at segment {root.last_segment}: {show(got)}, "
                f"not one of {[show(version.content) for version in may]}"
            )

    def found(self, node: str, root: Root, size: int) -> None:
        """A node serves a volume: one that nobody else knows yet, perhaps."""
        if (root.log_id, node) in self.lives or root.log_id == NO_ID:
            return
        content = self.stored.contents(root, hot(max(size, SMALL)))
        assert self._matches(self.births[node, root.name], content), (
            f"{root.name} of {node} came from nowhere"
        )
        life = Life(root, node, size, content, float(root.created_at))  # its node may have died since
        self._born(life, published=False)
        seen = self.roots.get(manifest_key(PREFIX, root.name))
        life.contested = seen is not None and not seen.root.removed_at

    def named(self, life: Life) -> Seen | None:
        """The root of a life's volume in the store, if it names it."""
        seen = self.roots.get(manifest_key(PREFIX, life.name))
        return seen if seen is not None and seen.root.log_id == life.log_id else None
