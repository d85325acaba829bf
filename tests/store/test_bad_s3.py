"""Nothing but the store's own word counts: every status, with every kind of body, on every request."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from bad_s3 import BUCKET, SHAPES, BadS3, Fault, Shape, error_document

from glidefs.errors import CorruptObject, NotFound, PreconditionFailed, StoreError, StoreUnavailable
from glidefs.store import open_store
from glidefs.store.base import ObjectStore
from glidefs.store.resilient import ResilientStore

LONG = os.environ.get("GLIDEFS_TEST_LENGTH") == "long"
SOME = [200, 201, 204, 206, 301, 302, 304, 307, 400, 401, 403, 404, 405, 408, 409, 410, 412, 416, 429, 451]
SOME += [500, 501, 503, 504, 599]
STATUSES = list(range(200, 600)) if LONG else SOME


@pytest.fixture
def s3(s3_credentials: None) -> Iterator[BadS3]:
    with BadS3() as server:
        yield server


@pytest.fixture
def store(s3: BadS3) -> Iterator[ObjectStore]:
    with open_store(f"s3://{BUCKET}/root", endpoint_url=s3.endpoint) as opened:
        opened.put("p/k", b"0123456789")
        yield opened


def requests(store: ObjectStore) -> dict[str, Callable[[], object]]:
    """One of each kind, about an object that is there."""
    etag = store.head("p/k").etag
    return {
        "get": lambda: store.get("p/k"),
        "get_range": lambda: store.get_range("p/k", 2, 4),
        "get_suffix": lambda: store.get_suffix("p/k", 4),
        "head": lambda: store.head("p/k"),
        "put": lambda: store.put("p/new", b"new"),
        "put if match": lambda: store.put("p/k", b"other", if_match=etag),
        "put if none": lambda: store.put("p/new", b"new", if_none_match=True),
        "delete": lambda: store.delete("p/k"),
        "list": lambda: list(store.list("p/")),
        "list_dirs": lambda: store.list_dirs(""),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_stores_own_word_counts(s3: BadS3, store: ObjectStore, shape: Shape) -> None:
    calls = requests(store)
    for status in STATUSES:
        s3.fault = Fault(status, shape)
        for name, call in calls.items():
            if name == "delete" and status == 204:
                continue  # the one success that cannot be told from the store's own
            with pytest.raises(StoreError) as caught:
                print(status, shape, name, call())
            error = caught.value
            assert not isinstance(error, NotFound | PreconditionFailed), (status, name)
            assert error.temporary or error.waits, (status, name, error)
            assert "\n" not in str(error)
    s3.fault = None
    assert store.get("p/k").data == b"0123456789"
    assert [info.key for info in store.list("")] == ["p/k"]


def test_what_is_absent_is_told(store: ObjectStore) -> None:
    absences: list[Callable[[], object]] = [
        lambda: store.get("p/none"),
        lambda: store.head("p/none"),
        lambda: store.get_range("p/none", 0, 1),
        lambda: store.get_suffix("p/none", 1),
    ]
    for absence in absences:
        with pytest.raises(NotFound):
            absence()
    for conditions in ({"if_match": '"x"'}, {"if_none_match": True}):
        with pytest.raises(PreconditionFailed):
            store.put("p/k", b"y", **conditions)  # type: ignore[arg-type]
    with pytest.raises(PreconditionFailed):
        store.put("p/none", b"y", if_match='"x"')
    store.delete("p/none")
    assert list(store.list("p/none/")) == []
    assert store.list_dirs("p/none/") == []


@pytest.mark.parametrize("shape", SHAPES)
def test_a_404_to_a_head_is_looked_after(s3: BadS3, store: ObjectStore, shape: Shape) -> None:
    s3.fault = Fault(404, shape, frozenset({"HEAD"}), code="NoSuchKey")
    with pytest.raises(StoreUnavailable):
        store.head("p/k")
    with pytest.raises(NotFound):
        store.head("p/none")


def test_an_object_that_is_not_deleted_is_told(s3: BadS3, store: ObjectStore) -> None:
    s3.fault = Fault(202, "html", frozenset({"DELETE"}))
    with pytest.raises(StoreUnavailable):
        store.delete("p/k")
    store.delete("p/none")
    s3.fault = Fault(404, "xml", frozenset({"DELETE"}), code="NoSuchKey")
    store.delete("p/none")


LISTING = b"<ListBucketResult><IsTruncated>false</IsTruncated>%b</ListBucketResult>"


@pytest.mark.parametrize(
    "body",
    [
        b" ",
        b"<html/>",
        b"<ListBucketResult></ListBucketResult>",
        LISTING[:-9],
        LISTING % b"<Prefix>root/other/</Prefix>",
        LISTING % b"<Contents><Key>other/k</Key><Size>1</Size><ETag>x</ETag></Contents>",
        LISTING % b"<Contents><Key>root/p/k</Key></Contents>",
        LISTING % b"<CommonPrefixes><Prefix>other/</Prefix></CommonPrefixes>",
        LISTING.replace(b"false", b"true") % b"",
        error_document("InternalError"),
        error_document("NoSuchKey"),
    ],
    ids=repr,
)
def test_what_is_no_listing_is_not_an_empty_one(s3: BadS3, store: ObjectStore, body: bytes) -> None:
    s3.fault = Fault(200, raw=body)
    for call in (lambda: store.list_page("p/"), lambda: store.list_dirs("p/")):
        with pytest.raises(StoreUnavailable):
            call()


def test_a_page_with_an_etag_is_no_object(s3: BadS3, store: ObjectStore) -> None:
    for body in (
        b"<html>\n",
        b" <!DOCTYPE html>",
        b"<?xml version='1.0'?><Error/>",
        error_document("SlowDown"),
    ):
        store.put("p/page", body)  # so that it has all that an object has
        with pytest.raises(StoreUnavailable):
            store.get("p/page")


def test_a_range_beyond_the_end_is_damage_only_if_the_store_says_so(s3: BadS3, store: ObjectStore) -> None:
    with pytest.raises(CorruptObject):
        store.get_range("p/k", 20, 4)
    s3.fault = Fault(416, "bare")
    with pytest.raises(StoreUnavailable):
        store.get_range("p/k", 20, 4)


def note(results: dict[str, object], name: str, call: Callable[[], object]) -> None:
    results[name] = call()


@pytest.mark.parametrize("status", [200, 204, 302, 400, 403, 404, 405, 412, 416, 429, 500, 503])
def test_a_patient_store_waits_for_the_end_of_it(s3: BadS3, store: ObjectStore, status: int) -> None:
    patient = ResilientStore(store)
    patient.patient = True
    waiting: dict[str, Callable[[], object]] = {
        "get": lambda: patient.get("p/k").data,
        "get_range": lambda: bytes(patient.get_range("p/k", 2, 4)),
        "head": lambda: patient.head("p/k").size,
        "list": lambda: [info.key for info in patient.list("p/k")],
        "put": lambda: bool(patient.put("p/put", b"new")),
    }
    expected = {"get": b"0123456789", "get_range": b"2345", "head": 10, "list": ["p/k"], "put": True}
    for shape in SHAPES:
        s3.fault = Fault(status, shape, frozenset({"GET", "HEAD", "LIST", "PUT"}))
        results: dict[str, object] = {}
        threads = [
            threading.Thread(target=partial(note, results, name, call)) for name, call in waiting.items()
        ]
        hit = sum(s3.faults.values())
        for thread in threads:
            thread.start()
        until = time.monotonic() + 20
        while sum(s3.faults.values()) < hit + len(threads):
            assert time.monotonic() < until
            time.sleep(0.005)
        assert results == {}
        s3.fault = None
        for thread in threads:
            thread.join(20)
        assert results == expected
