"""glidefs cost: what volumes cost at an object store, by the design and a table of prices. No daemon.

Requests follow from what the code does: a round of uploads is one commit (packs, changed pages, one root), a
volume is compared with its root, compaction rewrites, gc lists and deletes. Where the design gives a bound,
the bound is taken, so a bill should be lower. docs/sizing.md says which figures were measured.
"""

from __future__ import annotations

from math import ceil
from typing import Annotated, Any, NamedTuple

import typer

from glidefs.cli import output
from glidefs.cli.common import reported, seconds
from glidefs.cli.options import Json

DAY = 86400.0
MONTH = 30
"""Days."""
GIB = 1 << 30
SECTOR = 4096
PAGE_SPAN = 128 * GIB
"""Of a volume, for each page of its manifest; the page of a smaller volume is inside its root."""
LISTED = 1000
"""Objects in one answer to a LIST."""
COMPACTED = 0.9
"""Bytes that compaction uploads for each byte written at random over a full volume: measured."""
SUPERSEDED = 0.5
"""Of the bytes of a volume's oldest packs, what may be superseded before compaction rewrites them."""
GC_RUNS = 4
GC_WAIT = 1.5
"""Runs of gc a day, and days until it deletes what nothing names, with the timer and the default grace."""


class Load(NamedTuple):
    """What the volumes do. Bytes and seconds; ``written`` and ``read`` for each volume and day.

    ``data``: plain bytes that each holds by itself; what forks share counts once. ``compress``: stored
    bytes for each plain byte. ``active``: seconds of a day in which a volume is written to.
    ``read_size``: bytes of one GET.
    """

    volumes: int = 1
    hosts: int = 1
    size: int = 100 * GIB
    data: int = 100 * GIB
    written: int = 5 * GIB
    active: float = DAY
    compress: float = 0.5
    read: int = 1 * GIB
    read_size: int = 131072
    snapshots: int = 0
    snapshot_every: float = DAY
    compacted: float = COMPACTED


class Tuning(NamedTuple):
    """What of a host's settings matters here. Bytes and seconds."""

    sync_interval: float = 30.0
    poll_interval: float = 15.0
    pack_size: int = 32 << 20
    batch: int = 256 << 20
    width: int = 16
    kept: int = 3
    read_limit: int = 4 << 20
    heads_per_second: float = 50.0
    worth_a_page: int = 8


class Prices(NamedTuple):
    """In one currency: for a GiB and month, for 1000 requests, for a GiB that leaves the region."""

    stored: float = 0.023
    put: float = 0.005
    get: float = 0.0004
    delete: float = 0.0
    out: float = 0.0


class Requests(NamedTuple):
    """Of one day. LIST costs what PUT costs at most stores, HEAD what GET does."""

    put: float = 0.0
    list: float = 0.0
    get: float = 0.0
    head: float = 0.0
    delete: float = 0.0

    def __add__(self, other: Requests) -> Requests:  # type: ignore[override]
        return Requests(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, number: float) -> Requests:
        """That many times as many."""
        return Requests(*(number * value for value in self))


class Uploads(NamedTuple):
    """Of one volume and day."""

    commits: float
    packs: float
    pages: float


def uploads(load: Load, tuning: Tuning) -> Uploads:
    """Rounds of uploads: by age while a volume is written to, by amount if it is written to faster."""
    if not load.written:
        return Uploads(0.0, 0.0, 0.0)
    by_age = max(1.0, load.active / tuning.sync_interval)
    commits = min(max(by_age, load.written / tuning.batch), ceil(load.written / SECTOR))
    each = load.written / commits
    pages = ceil(load.size / PAGE_SPAN)
    touched = 0 if pages == 1 else min(pages, ceil(each / SECTOR))
    return Uploads(commits, commits * ceil(round(each / tuning.pack_size, 6)), commits * touched)


def _writing(done: Uploads, tuning: Tuning) -> Requests:
    looks = max(0, ceil(tuning.sync_interval / tuning.poll_interval) - 1)
    return Requests(put=done.packs + done.pages + done.commits, head=done.commits * looks)


def _compacting(load: Load, done: Uploads, tuning: Tuning) -> Requests:
    """Each merge ends a run of all but a few of the layers that it was started by, and is a commit."""
    if not load.compacted or not done.commits:
        return Requests()
    moved = load.written * load.compacted
    packs = max(moved / tuning.pack_size, done.packs / (tuning.width - tuning.kept))
    pages = done.pages / done.commits * packs
    return Requests(
        put=packs * 2 + pages, get=max(moved / tuning.read_limit, done.packs), delete=packs + pages
    )


def _watching(load: Load, tuning: Tuning) -> Requests:
    """Idle volumes: all hosts, one day. A host lists where that is worth it, else asks for each root."""
    idle = DAY - (load.active if load.written else 0.0)
    rounds = 2 * idle / tuning.sync_interval
    here = ceil(load.volumes / load.hosts)
    answers = ceil(load.volumes * (1 + load.snapshots) / LISTED)
    if here >= tuning.worth_a_page * answers:
        return Requests(list=rounds * answers * load.hosts)
    return Requests(head=min(rounds * here, idle * tuning.heads_per_second) * load.hosts)


def _collecting(load: Load, objects: float, deletes: float) -> Requests:
    """gc of one prefix: packs and pages once, roots at least twice and before each thousand deletes."""
    roots = load.volumes * (1 + load.snapshots)
    pages = ceil(load.size / PAGE_SPAN)
    looks = (2 + ceil(deletes / GC_RUNS / LISTED)) * (2 + ceil(roots / LISTED))
    run = Requests(
        put=2,
        list=2 + objects / LISTED + looks,
        get=roots * (1 if pages == 1 else 1 + pages),
    )
    return run.times(GC_RUNS) + Requests(delete=deletes)


def estimate(load: Load, tuning: Tuning | None = None, prices: Prices | None = None) -> dict[str, Any]:
    """Requests of a day and of 30 days, stored bytes, money for 30 days, each by what it is for."""
    tuning, prices = tuning or Tuning(), prices or Prices()
    done = uploads(load, tuning)
    writing = _writing(done, tuning).times(load.volumes)
    compacting = _compacting(load, done, tuning).times(load.volumes)
    sent = load.volumes * load.written * (1 + load.compacted) * load.compress
    live = load.volumes * load.data * load.compress
    kept = min(load.written * load.snapshot_every / DAY, load.data)
    stored = {
        "data": round(live),
        "superseded": round(min(live * SUPERSEDED, sent / (1 + load.compacted) * MONTH)),
        "waiting_for_gc": round(sent * GC_WAIT),
        "snapshots": round(load.volumes * load.snapshots * kept * load.compress),
    }
    deletes = (done.packs + done.pages) * load.volumes + compacting.delete
    objects = sum(stored.values()) / tuning.pack_size + deletes * GC_WAIT
    parts = {
        "uploads": writing,
        "compaction": compacting._replace(delete=0.0),
        "cold_reads": Requests(get=load.volumes * load.read / load.read_size),
        "idle_volumes": _watching(load, tuning),
        "gc": _collecting(load, objects, deletes),
    }
    total = Requests()
    for part in parts.values():
        total = total + part
    money = _money(total, sum(stored.values()), load.volumes * load.read, prices)
    return {
        "requests_per_day": {name: _rounded(part) for name, part in {**parts, "total": total}.items()},
        "requests_per_month": _rounded(total.times(MONTH)),
        "bytes_uploaded_per_day": round(sent),
        "stored_bytes": {**stored, "total": sum(stored.values())},
        "money_per_month": {**money, "total": round(sum(money.values()), 2)},
        "prices": prices._asdict(),
    }


def _rounded(requests: Requests) -> dict[str, int]:
    return {name: round(value) for name, value in requests._asdict().items()}


def _money(total: Requests, stored: int, read: float, prices: Prices) -> dict[str, float]:
    month = total.times(MONTH / 1000)
    return {
        "stored": round(stored / GIB * prices.stored, 2),
        "put_list": round((month.put + month.list) * prices.put, 2),
        "get_head": round((month.get + month.head) * prices.get, 2),
        "delete": round(month.delete * prices.delete, 2),
        "out": round(read / GIB * MONTH * prices.out, 2),
    }


# -- the command -----------------------------------------------------------------------------------


def _size(option: str, text: str) -> int:
    from glidefs.config import parse_size
    from glidefs.errors import ConfigError

    try:
        size = parse_size(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
    if not 0 <= size < 1 << 60:
        raise ConfigError(f"{option} {text} is out of range; a size is from 0 to 1EiB")
    return size


def _show(result: dict[str, Any]) -> None:
    days = result["requests_per_day"]
    rows = [
        (name.replace("_", " "), *(f"{counts[kind]:,}" for kind in Requests._fields))
        for name, counts in days.items()
    ]
    output.table(("requests a day", *(kind.upper() for kind in Requests._fields)), rows, right=range(1, 6))
    print()
    stored = {name.replace("_", " "): output.size_text(n) for name, n in result["stored_bytes"].items()}
    output.table(("stored", "at most"), list(stored.items()), right=(1,))
    print()
    money = {name.replace("_", ", "): f"{value:,.2f}" for name, value in result["money_per_month"].items()}
    output.table(("30 days", "money"), list(money.items()), right=(1,))


def _option(name: str, text: str, **more: Any) -> Any:
    return typer.Option(name, help=text, **more)


VolumesOption = Annotated[int, _option("--volumes", "Volumes.", min=1)]
HostsOption = Annotated[int, _option("--hosts", "Hosts that serve them.", min=1)]
SizeOption = Annotated[str, _option("--size", "Size of each.")]
DataOption = Annotated[
    str | None, _option("--data", "Bytes that each holds; of a fork, its own. Default: the size.")
]
WrittenOption = Annotated[str, _option("--written-per-day", "Bytes that guests write to each, a day.")]
ActiveOption = Annotated[str, _option("--active", "Time of a day in which each is written to.")]
CompressOption = Annotated[float, _option("--compress", "Stored bytes for each byte.", min=0.001, max=1)]
ReadOption = Annotated[str, _option("--read-cold", "Bytes that each reads from the store, a day.")]
ReadSizeOption = Annotated[
    str, _option("--read-size", "Bytes of one GET: 128KiB at random, 2MiB in sequence.")
]
SnapshotsOption = Annotated[int, _option("--snapshots", "Snapshots kept of each.", min=0)]
EveryOption = Annotated[str, _option("--snapshot-every", "Time between two of them.")]
CompactedOption = Annotated[float, _option("--compacted", "Bytes compacted for each written.", min=0, max=10)]
SyncOption = Annotated[str, _option("--sync-interval", "[upload] sync_interval of the hosts.")]
StoredPrice = Annotated[float, _option("--price-stored", "Of a GiB stored for a month.", min=0)]
PutPrice = Annotated[float, _option("--price-put", "Of 1000 PUT or LIST.", min=0)]
GetPrice = Annotated[float, _option("--price-get", "Of 1000 GET or HEAD.", min=0)]
DeletePrice = Annotated[float, _option("--price-delete", "Of 1000 DELETE.", min=0)]
OutPrice = Annotated[float, _option("--price-out", "Of a GiB read from another region.", min=0)]
EXAMPLE = Prices()


def cost(
    volumes: VolumesOption = 1,
    hosts: HostsOption = 1,
    size: SizeOption = "100GiB",
    data: DataOption = None,
    written: WrittenOption = "5GiB",
    active: ActiveOption = "24h",
    compress: CompressOption = 0.5,
    read: ReadOption = "1GiB",
    read_size: ReadSizeOption = "128KiB",
    snapshots: SnapshotsOption = 0,
    every: EveryOption = "24h",
    compacted: CompactedOption = COMPACTED,
    sync_interval: SyncOption = "30s",
    price_stored: StoredPrice = EXAMPLE.stored,
    price_put: PutPrice = EXAMPLE.put,
    price_get: GetPrice = EXAMPLE.get,
    price_delete: DeletePrice = EXAMPLE.delete,
    price_out: OutPrice = EXAMPLE.out,
    as_json: Json = False,
) -> None:
    """Estimate requests, stored bytes and money per month at an S3 store; needs no daemon.

    The prices are examples: S3 Standard in us-east-1, in dollars. docs/sizing.md says what is counted.
    """
    with reported(as_json):
        whole = max(1, _size("--size", size))
        load = Load(
            volumes=volumes,
            hosts=hosts,
            size=whole,
            data=whole if data is None else _size("--data", data),
            written=_size("--written-per-day", written),
            active=min(seconds(active) or 0.0, DAY),
            compress=compress,
            read=_size("--read-cold", read),
            read_size=max(SECTOR, _size("--read-size", read_size)),
            snapshots=snapshots,
            snapshot_every=seconds(every) or 0.0,
            compacted=compacted,
        )
        tuning = Tuning(sync_interval=max(1.0, seconds(sync_interval) or 0.0))
        prices = Prices(price_stored, price_put, price_get, price_delete, price_out)
        result = estimate(load, tuning, prices)
        if as_json:
            output.emit(result)
        else:
            _show(result)


def add_commands(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(cost)
