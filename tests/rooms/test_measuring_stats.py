"""Intervals that hold what they promise, and flips counted the right way round."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.measuring import stats


def paired_difference(before, after, **options):
    """After minus before over the same items, as the audit asks for it."""
    return stats.bootstrap(np.column_stack([before, after]), lambda m: m[..., 1] - m[..., 0], **options)


def test_known_answer_against_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = stats.bootstrap(values, resamples=4000)
    reach = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - reach, abs=0.04)
    assert found.high == pytest.approx(values.mean() + reach, abs=0.04)


def test_covers_at_about_its_level():
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(200):
        pairs = rng.random((40, 2)) < (0.4, 0.6)
        found = paired_difference(*pairs.T.astype(float), resamples=400, seed=trial)
        inside += found.low <= 0.2 <= found.high
    assert 178 <= inside <= 200  # 95 % nominal; 178 is four standard deviations below


def test_pairing_removes_the_spread_between_items():
    rng = np.random.default_rng(2)
    level = rng.normal(0, 10, 200)
    found = paired_difference(level, level + 0.5 + rng.normal(0, 0.1, 200))
    assert found.low > 0.47 and found.high < 0.53


def test_weights_are_those_of_the_records():
    found = stats.bootstrap([1.0, 3.0], weights=[3, 1])
    assert found.value == pytest.approx(1.5)
    once = stats.bootstrap([1.0, 1.0, 1.0, 3.0], resamples=200)
    assert once.value == pytest.approx(1.5)


@pytest.mark.parametrize(("value", "n"), [(1.0, 100), (0.0, 100), (1.0, 10)])
def test_all_alike_is_not_certainty(value, n):
    found = stats.bootstrap([value] * n, bounds=(0, 1))
    slack = 1 - 0.025 ** (1 / n)
    assert (found.low, found.high) == pytest.approx((max(0, value - slack), min(1, value + slack)))
    gap = paired_difference([0.0] * n, [value] * n, bounds=(0, 1))
    assert gap.low < value <= gap.high or value == 0
    assert gap.excludes() == (value == 1.0)


def test_an_unbounded_difference_of_nothing_is_exactly_nothing():
    found = paired_difference([1.5, 2.0, 4.0], [1.5, 2.0, 4.0])
    assert (found.value, found.low, found.high) == (0, 0, 0) and not found.excludes()


def test_no_items_and_one_item():
    assert math.isnan(stats.bootstrap([]).value)
    one = stats.bootstrap([2.0])
    assert (one.value, one.low, one.high) == (2.0, -math.inf, math.inf)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=40),
    st.integers(0, 5),
)
def test_laws(pairs, seed):
    before, after = (list(column) for column in zip(*pairs, strict=True))
    one = paired_difference(before, after, bounds=(0, 1), seed=seed, resamples=200)
    again = paired_difference(before, after, bounds=(0, 1), seed=seed, resamples=200)
    back = paired_difference(after, before, bounds=(0, 1), seed=seed, resamples=200)
    assert one == again
    assert back.value == pytest.approx(-one.value)
    assert one.low - 1e-9 <= one.high and one.low >= -1 and one.high <= 1
    turned = stats.flips(before, after)
    other = stats.flips(after, before)
    assert turned.negative == other.positive and turned.positive == other.negative
    assert not set(turned.negative) & set(turned.positive)


def test_flips_by_hand():
    found = stats.flips([1, 1, 0, 0], [1, 0, 1, 0], threshold=1.0)
    assert found == stats.Flips(negative=(1,), positive=(2,))


def test_minimum_detectable_is_detected_four_times_in_five():
    rng = np.random.default_rng(3)
    least = stats.minimum_detectable(np.zeros(60), rng.normal(0, 1, 60))
    hits = 0
    for trial in range(150):
        gaps = rng.normal(least, 1, 60)
        hits += stats.bootstrap(gaps, resamples=300, seed=trial).excludes()
    assert 0.68 < hits / 150 < 0.92
    assert stats.minimum_detectable([1, 1], [1, 1]) < math.inf
    assert stats.minimum_detectable([1], [1]) == math.inf


def test_calibration_by_hand():
    assert stats.calibration_error([0.9, 0.9, 0.1, 0.1], [1, 1, 0, 0]) == pytest.approx(0.1)
    assert stats.calibration_error([1.0, 1.0], [1, 0]) == pytest.approx(0.5)
