"""The handshake of structured replies and meta contexts."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbd_client import RawClient, Refused, context_request
from nbd_fakes import GIB, Bench

from glidefs.core.volume import ALLOCATION_ID, NbdModes
from glidefs.transport.nbd import proto
from glidefs.transport.nbd.proto import Option, Reply, TransmissionFlag

BASE = "base:allocation"


def modes(bench: Bench) -> NbdModes:
    """Of the only connection that the core has."""
    (conn_id,) = bench.core.wait_attached()
    return bench.core.modes[conn_id]


def test_a_client_that_asks_for_nothing_gets_simple_replies(bench: Bench) -> None:
    with bench.connect() as client:
        info = client.greet().go("disk")
        assert not info.flags & TransmissionFlag.SEND_DF
        assert modes(bench) == NbdModes()


def test_structured_replies(bench: Bench) -> None:
    with bench.connect() as client:
        info = client.greet().structured().structured().go("base")
        assert info.flags & TransmissionFlag.SEND_DF
        assert modes(bench) == NbdModes(read_only=True, structured=True)


def test_structured_replies_the_old_way(bench: Bench) -> None:
    with bench.connect() as client:
        client.greet().structured()
        assert client.contexts("disk", BASE) == {BASE: ALLOCATION_ID}
        info = client.export_name("disk")
        assert info.flags & TransmissionFlag.SEND_DF
        assert modes(bench) == NbdModes(structured=True, allocation=True)


@pytest.mark.parametrize(
    ("queries", "listed", "chosen"),
    [
        ((), True, False),
        (("base:",), True, False),
        ((BASE,), True, True),
        (("x:", BASE, BASE), True, True),
        (("qemu:dirty-bitmap:x", "base", "base:alloc", "base:allocation:", ""), False, False),
    ],
)
def test_what_is_listed_and_what_is_chosen(
    bench: Bench, queries: tuple[str, ...], listed: bool, chosen: bool
) -> None:
    with bench.connect() as client:
        client.greet().structured()
        assert bool(client.contexts("disk", *queries, option=Option.LIST_META_CONTEXT)) == listed
        assert client.contexts("disk", *queries) == ({BASE: ALLOCATION_ID} if chosen else {})
        client.go("disk")
        assert modes(bench) == NbdModes(structured=True, allocation=chosen)


def test_a_list_needs_no_structured_replies(bench: Bench) -> None:
    with bench.connect() as client:
        client.greet()
        assert set(client.contexts("disk", option=Option.LIST_META_CONTEXT)) == {BASE}
        with pytest.raises(Refused) as caught:
            client.contexts("disk", BASE)
        assert caught.value.kind == Reply.ERR_INVALID
        assert client.go("disk").size == GIB
        assert modes(bench) == NbdModes()


def test_contexts_are_of_one_export(bench: Bench) -> None:
    with bench.connect() as client:
        client.greet().structured()
        client.contexts("base", BASE)
        client.go("disk")
        assert modes(bench) == NbdModes(structured=True)


@pytest.mark.parametrize("second", [(), ("other:x",)])
def test_the_last_set_counts(bench: Bench, second: tuple[str, ...]) -> None:
    with bench.connect() as client:
        client.greet().structured()
        client.contexts("disk", BASE)
        assert client.contexts("disk", *second) == {}
        client.go("disk")
        assert modes(bench) == NbdModes(structured=True)


def test_a_set_that_fails_leaves_none(bench: Bench) -> None:
    with bench.connect() as client:
        client.greet().structured()
        client.contexts("disk", BASE)
        with pytest.raises(Refused) as caught:
            client.contexts("nothing", BASE)
        assert caught.value.kind == Reply.ERR_UNKNOWN
        client.go("disk")
        assert modes(bench) == NbdModes(structured=True)


GOOD = context_request("disk", BASE)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", Reply.ERR_INVALID),
        (GOOD[:-1], Reply.ERR_INVALID),
        (GOOD + b"x", Reply.ERR_INVALID),
        (struct.pack(">I", 0xFFFFFFFF) + GOOD[4:], Reply.ERR_INVALID),
        (struct.pack(">I4sI", 4, b"disk", 0xFFFFFFFF), Reply.ERR_TOO_BIG),
        (struct.pack(">I4sI", 4, b"disk", proto.MAX_QUERIES + 1), Reply.ERR_TOO_BIG),
        (struct.pack(">I4sI", 4, b"disk", 2) + GOOD[12:], Reply.ERR_INVALID),
        (struct.pack(">I4sII", 4, b"disk", 1, 0xFFFFFFFF), Reply.ERR_INVALID),
        (context_request("disk", "x" * 4097), Reply.ERR_INVALID),
        (struct.pack(">I4sII1s", 4, b"disk", 1, 1, b"\xff"), Reply.ERR_INVALID),
        (struct.pack(">I4sI", 4, b"\xff" * 4, 0), Reply.ERR_INVALID),
        (context_request("disk", *["y" * 4000] * 17), Reply.ERR_TOO_BIG),
    ],
)
@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_wrong_requests_are_refused(bench: Bench, option: int, data: bytes, kind: int) -> None:
    with bench.connect() as client:
        client.greet().structured()
        client.contexts("disk", BASE)
        assert client.ask(option, data)[-1].kind == kind
        assert client.ask(Option.STRUCTURED_REPLY, b"x")[-1].kind == Reply.ERR_INVALID
        assert client.go("disk").size == GIB


def test_as_many_queries_as_there_may_be(bench: Bench) -> None:
    with bench.connect() as client:
        client.greet().structured()
        queries = ["x:y"] * (proto.MAX_QUERIES - 1)
        assert client.contexts("disk", *queries, BASE) == {BASE: ALLOCATION_ID}


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    options=st.lists(
        st.tuples(
            st.sampled_from([8, 9, 10]),
            st.one_of(
                st.binary(max_size=40),
                st.builds(
                    lambda queries, cut, more: context_request("disk", *queries)[:cut] + more,
                    st.lists(st.sampled_from([BASE, "base:", "", "q", "x" * 4097]), max_size=4),
                    st.integers(0, 80) | st.just(1 << 20),
                    st.binary(max_size=3),
                ),
            ),
        ),
        max_size=6,
    )
)
def test_any_options(bench: Bench, options: list[tuple[int, bytes]]) -> None:
    """Each is answered by an ACK or an error, and the handshake goes on."""
    with bench.connect() as client:
        client.greet()
        for option, data in options:
            last = client.ask(option, data)[-1]
            assert last.kind == Reply.ACK or last.kind & 1 << 31
        assert client.infos(Option.INFO, "disk")
        assert isinstance(client, RawClient)
