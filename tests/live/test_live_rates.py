"""Rates, percentiles and the ring of samples, each against a simple model."""

from __future__ import annotations

import math
import struct
from bisect import bisect_right

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("glidefs.core._core")

from glidefs.core.brief import IDLE, Brief
from glidefs.live.rates import NOTHING, lower_bound, quantile, rates
from glidefs.live.ring import FIELDS, LENGTH, WIDTH, Ring, Sample, code, value_of, zeros

BOUNDS = [lower_bound(bucket) for bucket in range(64)]


def bucket_of(nanoseconds: int) -> int:
    """As csrc/volume/stats.h says it: the last one that begins at or below it."""
    return bisect_right(BOUNDS, nanoseconds / 1e9) - 1


def brief(latencies: list[int], numbers: dict[int, int] | None = None) -> Brief:
    """Of reads that took so many nanoseconds; ``numbers`` are others by place."""
    counts = [0] * 128
    for taken in latencies:
        counts[bucket_of(taken)] += 1
    values = [0] * 25
    values[0], values[12] = len(latencies), sum(latencies)
    for place, value in (numbers or {}).items():
        values[place] = value
    return Brief(tuple(values), struct.pack("@128Q", *counts))


def test_bounds_are_those_of_the_core() -> None:
    assert [round(bound * 1e9) for bound in BOUNDS[:6]] == [0, 384, 512, 768, 1024, 1536]
    assert BOUNDS[63] > 500


@given(st.floats(0, 2**62), st.sampled_from([unit for _, unit in FIELDS]))
def test_a_number_of_16_bits_is_nearly_exact(units: float, unit: float) -> None:
    value = units * unit
    kept = code(value, unit)
    assert 0 <= kept < 0xFFFF
    back = value_of(kept, unit)
    assert back is not None
    assert math.isclose(back + unit, value + unit, rel_tol=1e-3)
    assert (kept == 0) == (back == 0)


SAMPLES = st.one_of(
    st.just("nothing"), st.just("missed"), st.lists(st.sampled_from([0.0, 1.0, 1e6]), min_size=8, max_size=8)
)


@given(st.lists(SAMPLES, min_size=1, max_size=20), st.integers(0, 3 * LENGTH))
def test_a_ring_has_the_last_hour(given_samples: list[str | list[float]], begin: int) -> None:
    """Also where it begins anew in the middle, and where nobody looked."""
    ring = Ring(begin)
    model: dict[int, list[float] | None] = {}
    for number, sample in enumerate(given_samples, begin):
        if sample == "missed":
            ring.miss(number)
            model[number] = None
        elif sample == "nothing":
            ring.put(number, None)
            model[number] = [0.0] * WIDTH
        else:
            assert isinstance(sample, list)
            ring.put(number, tuple(sample))
            model[number] = sample
    last = begin + len(given_samples) - 1
    series = ring.series(max(0, last - LENGTH + 1), last)
    assert list(series) == [name for name, _ in FIELDS]
    for field, (name, _) in enumerate(FIELDS):
        told = series[name][-len(given_samples) :]
        for got, sample in zip(told, model.values(), strict=True):
            assert got is None if sample is None else math.isclose(got or 0.0, sample[field], rel_tol=1e-3)
        assert not any(series[name][: -len(given_samples)])


def test_a_ring_forgets_what_is_older() -> None:
    ring = Ring(0)
    busy: Sample = (1.0,) * WIDTH
    ring.put(5, busy)
    for number in range(6, LENGTH + 6):
        ring.put(number, None)
    assert ring.busy_at == 5
    assert ring.series(6, LENGTH + 5) == zeros(6, LENGTH + 5)


@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_percentile_is_in_the_bucket_of_the_right_request(latencies: list[int], part: float) -> None:
    counts = [0] * 64
    for taken in latencies:
        counts[bucket_of(taken)] += 1
    found = quantile(counts, part)
    rank = max(1, math.ceil(part * len(latencies) - 1e-9))
    bucket = bucket_of(sorted(latencies)[rank - 1])
    assert found is not None
    assert BOUNDS[bucket] <= found <= lower_bound(bucket + 1)


def test_no_request_has_no_percentile() -> None:
    assert quantile([0] * 64, 0.99) is None


def test_what_was_done_between_two_looks() -> None:
    before = brief([1000] * 10, {4: 40960, 17: 3})
    after = brief(
        [1000] * 10 + [2_000_000] * 30, {4: 163840, 16: 1, 17: 8, 18: 4, 24: 2, 1: 5, 5: 50, 13: 5000}
    )
    did = rates(before, after, 10.0)
    assert (did.read_iops, did.write_iops) == (3.0, 0.5)
    assert did.read_bytes == 12288.0
    assert did.read_mean == pytest.approx(2e-3)
    assert did.read_p99 == pytest.approx(2e-3, rel=0.5)
    assert did.write_mean == pytest.approx(1e-6)
    assert (did.log_hits, did.cache_hits, did.store_reads) == (0.5, 0.4, 0.1)
    assert did.waits == 0.2


def test_reads_and_writes_have_their_own_percentiles() -> None:
    one = brief([1000] * 10, {1: 10, 13: 10**7})
    both = Brief(one.numbers, one.latency[:512] + brief([10**6] * 10).latency[:512])
    did = rates(IDLE, both, 1.0)
    assert did.read_p99 == pytest.approx(1e-6, rel=0.5)
    assert did.write_p99 == pytest.approx(1e-3, rel=0.5)


def test_nothing_is_nothing() -> None:
    one = brief([1000])
    assert rates(one, one, 10.0) is NOTHING
    assert rates(IDLE, IDLE, 10.0) is NOTHING
    assert rates(one, brief([1000]), 10.0) is NOTHING


def test_a_volume_that_was_opened_again_began_at_zero() -> None:
    assert rates(brief([1000] * 100), brief([1000] * 7), 1.0).read_iops == 7.0
