"""The handshake of structured replies and meta contexts."""

from __future__ import annotations

import struct
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbd_client import RawClient, Refused, context_request
from nbd_fakes import GIB, Bench

from glidefs.core.volume import ALLOCATION_ID, MAX_SNAPSHOTS, NbdModes
from glidefs.errors import StoreUnavailable
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
        assert set(client.contexts("disk", option=Option.LIST_META_CONTEXT)) == {BASE, *CHANGED}
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


# ---- contexts of snapshots ----

CHANGED = [f"glidefs:changed:{sequence}" for sequence in (3, 17, 2**64 - 1)]


@pytest.mark.parametrize(
    ("queries", "listed"),
    [
        ((), [BASE, *CHANGED]),
        (("glidefs:",), CHANGED),
        (("glidefs:changed:",), CHANGED),
        (("base:", "glidefs:changed:", CHANGED[0]), [BASE, *CHANGED]),
        ((CHANGED[1],), CHANGED[1:2]),
        ((CHANGED[1], "glidefs:changed:4", CHANGED[0]), [CHANGED[1], CHANGED[0]]),
        (("base:",), [BASE]),
        (("glidefs", "glidefs:chang", "glidefs:changed", "glidefs:other:3", "changed:3"), []),
    ],
)
def test_snapshots_are_listed(bench: Bench, queries: tuple[str, ...], listed: list[str]) -> None:
    with bench.connect() as client:
        client.greet()
        found = client.contexts("disk", *queries, option=Option.LIST_META_CONTEXT)
        assert list(found) == listed
        assert not any(found.values())


def test_snapshots_are_chosen_by_their_names(bench: Bench) -> None:
    """In the order in which they were asked for, each once, behind base:allocation."""
    with bench.connect() as client:
        client.greet().structured()
        found = client.contexts("disk", CHANGED[1], "glidefs:changed:4", CHANGED[0], BASE, CHANGED[1])
        assert found == {BASE: ALLOCATION_ID, CHANGED[1]: ALLOCATION_ID + 1, CHANGED[0]: ALLOCATION_ID + 2}
        client.go("disk")
        assert modes(bench) == NbdModes(structured=True, allocation=True, changed=(17, 3))


def test_a_snapshot_alone(bench: Bench) -> None:
    with bench.connect() as client:
        client.greet().structured()
        assert client.contexts("disk", CHANGED[2]) == {CHANGED[2]: ALLOCATION_ID + 1}
        client.go("disk")
        assert modes(bench) == NbdModes(structured=True, changed=(2**64 - 1,))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "03",
        "+3",
        "3 ",
        "-3",
        "x",
        "3:",
        "3.0",
        "0x3",
        "\u0663",
        "9" * 21,
        "9" * 4000,
        "18446744073709551616",
    ],
)
def test_a_context_has_one_name(bench: Bench, name: str) -> None:
    with bench.connect() as client:
        client.greet().structured()
        for option in (Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT):
            wide = not name and option == Option.LIST_META_CONTEXT
            found = client.contexts("disk", f"glidefs:changed:{name}", option=option)
            assert list(found) == (CHANGED if wide else [])
        client.go("disk")


def test_at_most_so_many_snapshots_are_chosen(bench: Bench) -> None:
    bench.snapshots.sequences = tuple(range(1, 100))
    with bench.connect() as client:
        client.greet().structured()
        found = client.contexts("disk", *(f"glidefs:changed:{number}" for number in range(1, 100)))
        assert list(found) == [f"glidefs:changed:{number}" for number in range(1, 1 + MAX_SNAPSHOTS)]
        client.go("disk")
        assert modes(bench).changed == tuple(range(1, 1 + MAX_SNAPSHOTS))


def test_an_export_without_snapshots(bench: Bench) -> None:
    with bench.connect() as client:
        client.greet().structured()
        assert client.contexts("base", BASE, *CHANGED) == {BASE: ALLOCATION_ID}
        assert client.contexts("base", option=Option.LIST_META_CONTEXT) == {BASE: 0}


def test_the_store_is_asked_only_for_snapshots(bench: Bench) -> None:
    with bench.connect() as client:
        client.greet().structured()
        client.contexts("disk", BASE, "qemu:dirty-bitmap:x")
        client.contexts("disk", "base:", option=Option.LIST_META_CONTEXT)
        client.contexts("disk")
        client.go("disk")
    assert bench.snapshots.asked == 0


def test_while_the_store_is_away_there_are_none(bench: Bench) -> None:
    bench.snapshots.fail = StoreUnavailable("away")
    with bench.connect() as client:
        client.greet().structured()
        assert client.contexts("disk", BASE, *CHANGED) == {BASE: ALLOCATION_ID}
        assert client.contexts("disk", option=Option.LIST_META_CONTEXT) == {BASE: 0}
        client.go("disk")
        assert modes(bench) == NbdModes(structured=True, allocation=True)


def test_who_waits_for_the_store_holds_nobody_up(bench: Bench) -> None:
    bench.snapshots.gate = threading.Event()
    waiting = [bench.connect() for _ in range(6)]
    for client in waiting:
        client.greet().structured()
        client.option(Option.LIST_META_CONTEXT, context_request("disk"))
    assert bench.snapshots.entered.wait(20)
    with bench.connect() as client:
        assert client.greet().go("disk").size == GIB
        assert bench.core.wait_attached()
    bench.snapshots.gate.set()
    for client in waiting:
        assert client.option_reply().kind == Reply.META_CONTEXT
        client.close()


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
                    st.lists(
                        st.sampled_from([BASE, "base:", "", "x" * 4097, "glidefs:changed:", *CHANGED]),
                        max_size=4,
                    ),
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
