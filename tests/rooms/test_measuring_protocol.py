"""The protocol: its numbers by hand, its intervals by trial, its verdicts by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import LuthierError
from luthier.measuring.protocol import (
    VERDICTS,
    Arm,
    Paired,
    Plan,
    Spread,
    equal_budgets,
    gentlest,
    judge,
    needed,
    paired,
    quantile_t,
    spread,
)


def test_the_parts_of_variance_by_hand():
    """[[0, 2], [4, 6]]: rows 1 and 5, columns 2 and 4, nothing left over. Mean squares 16, 4, 0 of one degree each, so
    the parts are 16 / 2 = 8 and 4 / 2 = 2."""
    got = spread(np.zeros((2, 2)), np.array([[0.0, 2.0], [4.0, 6.0]]))
    assert (got.seeds, got.items, got.rest) == pytest.approx((math.sqrt(8), math.sqrt(2), 0.0))
    assert got.error(2, 2) == pytest.approx(math.sqrt(8 / 2 + 2 / 2))
    assert got.freedom(2, 2) == pytest.approx(25 / (16 + 1))


@pytest.mark.parametrize(
    ("share", "freedom", "table"),
    [
        (0.975, 4, 2.776),
        (0.975, 9, 2.262),
        (0.95, 5, 2.015),
        (0.975, 30, 2.042),
        (0.995, 10, 3.169),
        (0.975, 1e9, 1.960),
    ],
)
def test_students_quantiles_are_those_of_the_tables(share, freedom, table):
    assert quantile_t(share, freedom) == pytest.approx(table, rel=0.01)


def drawn(rng, seeds, items, effect, parts):
    rows, columns = rng.normal(0, parts.seeds, (seeds, 1)), rng.normal(0, parts.items, (1, items))
    return effect + rows + columns + rng.normal(0, parts.rest, (seeds, items))


@pytest.mark.parametrize("parts", [Spread(0.1, 0.1, 0.3), Spread(0.0, 0.0, 0.3), Spread(0.02, 0.3, 0.3)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(parts):
    """200 worlds in which mostly seeds, only the rest, mostly items differ: 0.95 is said, 0.91 to 0.98 is had."""
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(200):
        found = paired(np.zeros((5, 60)), drawn(rng, 5, 60, 0.1, parts), resamples=200, seed=i)
        inside += found.low <= 0.1 <= found.high
    assert 0.88 <= inside / 200 <= 1.0


@pytest.mark.parametrize("parts", [Spread(0.02, 0.25, 0.3), Spread(0.0, 0.02, 0.8), Spread(0.04, 0.1, 0.4)])
def test_power_said_in_advance_is_the_power_there_is(parts):
    rng = np.random.default_rng(1)
    plan = Plan(effect=0.12, seeds=6, items=60, spread=parts)
    assert 0.5 < plan.power() < 0.99
    hits = 0
    for i in range(150):
        found = paired(np.zeros((6, 60)), drawn(rng, 6, 60, 0.12, parts), resamples=200, seed=i)
        hits += judge(plan, found).verdict == "reproduced"
    assert hits / 150 == pytest.approx(
        plan.power(), abs=0.15
    )  # where nothing but the rest differs, parts estimated at 0 or above widen it


def test_what_is_needed_reaches_its_power_and_one_item_less_does_not():
    parts = Spread(0.01, 0.3, 0.4)
    plans = needed(0.05, parts)
    assert plans and all(a[0] < b[0] and a[1] > b[1] for a, b in zip(plans, plans[1:], strict=False))
    for seeds, items in plans:
        assert Plan(0.05, seeds, items, parts).power() >= 0.8 > Plan(0.05, seeds, items - 1, parts).power()
    assert needed(0.001, Spread(0.5, 0.1, 0.1)) == []  # no number of items mends seeds that differ


@settings(max_examples=60, deadline=None)
@given(
    effect=st.floats(0.001, 1),
    seeds=st.integers(2, 30),
    items=st.integers(2, 4000),
    s=st.floats(0, 0.5),
    i=st.floats(0, 1),
)
def test_more_is_never_less_power(effect, seeds, items, s, i):
    parts = Spread(s, i, 0.1)
    plan = Plan(effect, seeds, items, parts)
    assert plan.power() <= Plan(effect * 2, seeds, items, parts).power() + 1e-12
    assert parts.error(seeds + 1, items + 1) < parts.error(seeds, items)


ARMS = (Arm("lora", {1e-4: 0.5, 1e-3: 0.7, 1e-2: 0.6}), Arm("full", {1e-5: 0.6, 1e-4: 0.8, 1e-3: 0.1}))


@pytest.mark.parametrize(
    ("low", "high", "sign", "verdict"),
    [
        (0.01, 0.2, 1, "reproduced"), (0.01, 0.2, -1, "not reproduced"), (-0.2, -0.01, -1, "reproduced"),
        (-0.02, 0.04, 1, "not reproduced"), (-0.02, 0.06, 1, "underpowered"), (-0.04, 0.02, -1, "not reproduced"),
        (-0.06, 0.02, -1, "underpowered"),
    ],
)  # fmt: skip
def test_verdicts_by_their_intervals(low, high, sign, verdict):
    plan = Plan(0.05, 5, 100, Spread(0.01, 0.1, 0.1), sign=sign)
    got = judge(plan, Paired((low + high) / 2, 0.02, low, high, 5, 100), ARMS)
    assert got.verdict == verdict and got.verdict in VERDICTS and "in this world" in str(got) and got.tuning == ()


def test_tuning_that_differs_is_refused_and_an_open_edge_is_told():
    plan, found = Plan(0.05, 5, 100, Spread(0, 0.1, 0.1)), Paired(0.1, 0.01, 0.08, 0.12, 5, 100)
    with pytest.raises(LuthierError, match="tries differ: lora 3, full 1"):
        judge(plan, found, (ARMS[0], Arm("full", {1e-4: 0.8})))
    edge = Arm("full", {1e-5: 0.6, 1e-4: 0.8, 1e-3: 0.9})
    assert edge.at_edge() and edge.best() == 1e-3
    assert "full scores best at the edge of its sweep, 0.001" in str(judge(plan, found, (ARMS[0], edge)))
    assert equal_budgets(ARMS) == [] and Arm("tie", {2.0: 1.0, 1.0: 1.0, 3.0: 0.0}).best() == 1.0


@pytest.mark.parametrize(
    ("scores", "chosen", "open_edge"),
    [
        ((0.9, 0.8, 0.1), 1e-4, True),  # falling from the first on: a smaller one may be better
        ((0.95, 0.96, 0.1), 1e-4, False),  # taken as not shown to be worse than one inside, where the top is
        ((0.1, 0.2, 0.3), 1e-4, True),  # taken as not shown to be worse than the largest, where it still rises
        ((0.1, 0.2, 0.3), 1e-3, False),  # as good as the largest, inside
        ((0.1, 0.8, 0.9), 1e-2, True),
        ((1.0, 1.0, 0.9), None, False),  # a top that reaches inside
        ((0.2, 0.9, 0.8), None, False),
    ],
)
def test_an_edge_is_open_where_a_better_setting_may_lie_outside(scores, chosen, open_edge):
    arm = Arm("full", dict(zip((1e-4, 1e-3, 1e-2), scores, strict=True)), chosen)
    assert arm.at_edge() == open_edge
    edge = "0.0001" if scores[0] > scores[-1] else "0.01"
    told = [f"full scores best at the edge of its sweep, {edge}"] if open_edge else []
    assert equal_budgets([arm, ARMS[0]]) == told


def test_one_setting_has_no_edge_and_two_have_nothing_between():
    assert not Arm("a", {1.0: 0.5}).at_edge() and not Arm("a", {}).at_edge()
    assert Arm("a", {1.0: 0.5, 2.0: 0.5}).at_edge()


def test_the_gentlest_setting_that_is_not_shown_to_be_worse_is_taken():
    best, two_less, far = np.ones(200), np.ones(200), np.ones(200)
    two_less[:2], far[:40] = 0, 0
    assert gentlest({1e-3: best, 3e-4: two_less, 1e-4: far}) == 3e-4
    assert gentlest({1e-3: best, 1e-4: far}) == 1e-3 and gentlest({2.0: best, 1.0: best}) == 1.0
    taken = Arm("full", {1e-4: 0.8, 3e-4: 0.99, 1e-3: 1.0}, 3e-4)
    assert taken.best() == 3e-4 and not taken.at_edge()


def test_less_than_planned_is_refused():
    with pytest.raises(LuthierError, match="planned 5 seeds and 100 items, got 4 and 100"):
        judge(Plan(0.05, 5, 100, Spread(0, 0.1, 0.1)), Paired(0.1, 0.01, 0.08, 0.12, 4, 100))


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (np.zeros((3, 4)), np.zeros((3, 5)), "the same for both"), (np.zeros((1, 4)), np.zeros((1, 4)), "2 of each"),
        (np.zeros(4), np.zeros(4), "seeds, items"), (np.zeros((2, 2)), np.full((2, 2), np.nan), "not a number"),
    ],
)  # fmt: skip
def test_scores_that_do_not_pair(a, b, told):
    with pytest.raises(LuthierError, match=told) as error:
        paired(a, b)
    assert "\n" not in str(error.value)


def test_no_difference_at_all():
    found = paired(np.ones((3, 5)), np.ones((3, 5)))
    assert (found.effect, found.low, found.high, found.errors) == (0, 0, 0, 0)
    still = spread(np.ones((3, 5)), np.ones((3, 5)))
    assert Plan(0.05, 3, 5, still).power() < 0.1 and Plan(0.05, 3, 400, still).power() > 0.99
    assert judge(Plan(0.05, 3, 5, Spread(0, 0, 0)), found).verdict == "underpowered"
    assert (
        judge(Plan(0.05, 3, 5, Spread(0, 0, 0), sign=0), found).verdict == "underpowered"
    )  # five items exclude little
    many = paired(np.ones((3, 400)), np.ones((3, 400)))
    assert judge(Plan(0.05, 3, 400, Spread(0, 0, 0), sign=0), many).verdict == "reproduced"


def test_a_few_differing_answers_of_many_prove_nothing():
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        d = np.zeros((5, 200))
        d.flat[rng.choice(d.size, 4, replace=False)] = rng.choice([-1.0, 1.0], 4)
        found = paired(np.zeros_like(d), d, resamples=200)
        wrong += found.low > 0 or found.high < 0
    assert wrong / 200 <= 0.1
    one = np.zeros((5, 210))
    one[0, 0] = -1.0
    assert (
        judge(Plan(0.05, 5, 210, Spread(0.01, 0.1, 0.1), sign=-1), paired(np.zeros_like(one), one)).verdict
        != "reproduced"
    )


def test_an_effect_smaller_than_what_matters_is_told_to_be():
    got = judge(Plan(0.3, 5, 100, Spread(0.01, 0.1, 0.1)), Paired(0.2, 0.02, 0.16, 0.24, 5, 100))
    assert got.verdict == "reproduced" and "less than the 0.3 that matters" in got.reason


@pytest.mark.parametrize("bad", [{"effect": 0}, {"effect": float("nan")}, {"sign": 2}, {"seeds": 1}, {"items": 1}])
def test_plans_that_cannot_be(bad):
    with pytest.raises(LuthierError, match="choose"):
        Plan(**{"effect": 0.1, "seeds": 5, "items": 10, "spread": Spread(0, 0, 1), **bad})


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.04, 0.03, 0), (0.01, 0.04, 0), (-0.06, 0.01, 2), (0.02, 0.2, 2), (0.05, 0.09, 1), (-0.3, -0.1, 1)],
)
def test_a_tie_is_claimed_within_a_bound(low, high, verdict):
    plan = Plan(0.05, 5, 100, Spread(0.01, 0.1, 0.1), sign=0)
    found = Paired((low + high) / 2, 0.01, low, high, 5, 100)
    assert judge(plan, found).verdict == VERDICTS[verdict]


def test_a_ties_power_is_the_share_of_ties_told():
    rng = np.random.default_rng(1)
    parts = Spread(0.01, 0.05, 0.2)
    plan = Plan(0.03, 6, 150, parts, sign=0)
    told = 0
    for _ in range(300):
        d = (
            rng.normal(0, parts.seeds, (6, 1))
            + rng.normal(0, parts.items, (1, 150))
            + rng.normal(0, parts.rest, (6, 150))
        )
        told += judge(plan, paired(np.zeros_like(d), d, resamples=200)).verdict == "reproduced"
    assert 0.5 < plan.power() < 0.999
    assert told / 300 == pytest.approx(plan.power(), abs=0.08)
