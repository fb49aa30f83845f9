"""Intervals and tests: known values, and properties that hold for any data."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from emreason.scores import stats

counts = st.integers(0, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60)
p_values = st.lists(st.floats(0, 1), max_size=12)


@given(counts)
def test_wilson_holds_the_proportion_and_mirrors(pair):
    k, n = pair
    low, high = stats.wilson(k, n)
    assert 0 <= low <= (k / n if n else 0.5) + 1e-12
    assert (k / n if n else 0.5) - 1e-12 <= high <= 1
    mirrored = stats.wilson(n - k, n)
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))


def test_wilson_known_values():
    assert stats.wilson(0, 0) == (0.0, 1.0)
    assert stats.wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert stats.wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    with pytest.raises(ValueError):
        stats.wilson(3, 2)


@given(outcomes)
def test_mcnemar_is_symmetric_and_a_probability(pairs):
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    assert stats.mcnemar(a, b) == pytest.approx(stats.mcnemar(b, a))
    assert 0 <= stats.mcnemar(a, b) <= 1
    assert stats.mcnemar(a, a) == 1


def test_mcnemar_known_value():
    a, b = [True] * 8 + [False] * 1 + [True] * 5, [False] * 8 + [True] * 1 + [True] * 5
    assert stats.mcnemar(a, b) == pytest.approx(2 * (1 + 9) / 2**9)  # 1 of 9 discordant, both tails
    with pytest.raises(ValueError):
        stats.mcnemar(a, b[:-1])


@given(st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=4, max_size=12), min_size=1, max_size=3))
def test_bootstrap_estimates_the_difference_and_changes_sign_with_the_sides(seeds):
    first = [{i: a for i, (a, _) in enumerate(s)} for s in seeds]
    second = [{i: b for i, (_, b) in enumerate(s)} for s in seeds]
    forth, back = (stats.paired_bootstrap(*sides, resamples=300) for sides in ((first, second), (second, first)))
    cells = [int(a) - int(b) for s in seeds for a, b in s]
    assert forth.estimate == pytest.approx(sum(cells) / len(cells))
    assert forth.estimate == pytest.approx(-back.estimate)
    assert forth.low <= forth.high
    assert 0 < forth.p <= 1


def test_bootstrap_sees_a_clear_difference_and_not_an_absent_one():
    good = [{i: i % 10 != s for i in range(100)} for s in range(3)]
    bad = [{i: i % 10 < 4 for i in range(100)} for s in range(3)]
    clear = stats.paired_bootstrap(good, bad)
    assert clear.p < 0.001
    assert 0 < clear.low < clear.estimate < clear.high
    assert (clear.seeds, clear.questions) == (3, 100)
    assert stats.paired_bootstrap(good, good).p == 1
    noise = [[{i: (i * factor + s) % 3 == 0 for i in range(99)} for s in range(3)] for factor in (7, 5)]
    assert stats.paired_bootstrap(*noise).p > 0.5
    with pytest.raises(ValueError, match="share no question"):
        stats.paired_bootstrap([{1: True}], [{2: True}])


def test_one_seed_bootstrap_agrees_with_mcnemar():
    a = {i: i < 70 for i in range(100)}
    b = {i: 20 <= i < 74 for i in range(100)}
    exact = stats.mcnemar(list(a.values()), list(b.values()))
    assert stats.paired_bootstrap([a], [b]).p == pytest.approx(exact, abs=0.01)


def test_bootstrap_resamples_seeds():
    """All questions gained at one seed, none at the other: of two seeds drawn, both are the first in a quarter of the cases."""
    right, wrong = dict.fromkeys(range(50), True), dict.fromkeys(range(50), False)
    difference = stats.paired_bootstrap([right, wrong], [wrong, wrong])
    assert (difference.estimate, difference.low, difference.high) == (0.5, 0.0, 1.0)


def test_bootstrap_interval_is_the_95_percent_one_and_p_two_sided():
    """Of 100 questions 12 won, 4 lost: the mean of 100 draws from (−1, 0, 1), exactly, by convolution."""
    a, b = {i: i < 12 for i in range(100)}, {i: 12 <= i < 16 for i in range(100)}
    law = np.array([1.0])
    for _ in range(100):
        law = np.convolve(law, [0.04, 0.84, 0.12])
    low, high = (np.searchsorted(law.cumsum(), q) - 100 for q in (0.025, 0.975))
    difference = stats.paired_bootstrap([a], [b])
    assert (difference.low, difference.high) == pytest.approx((low / 100, high / 100), abs=1e-9)
    beyond = law[: 100 + 1].sum() + law[100 + 16 :].sum()  # as far from 8 as 0 is, on either side
    assert difference.p == pytest.approx(beyond, abs=4.5 * math.sqrt(beyond / 20_000))


@given(p_values)
def test_holm_lies_between_raw_and_bonferroni_and_keeps_the_order(ps):
    adjusted = stats.holm(ps)
    for p, q in zip(ps, adjusted, strict=True):
        assert p - 1e-12 <= q <= min(1.0, len(ps) * p) + 1e-12
    ranked = [q for _, q in sorted(zip(ps, adjusted, strict=True))]
    assert ranked == sorted(ranked)


def test_holm_known_values():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []


def test_mean_interval():
    assert stats.mean_interval([0.4]) == (0.4, None)
    mean, half = stats.mean_interval([0.90, 0.92, 0.94])
    assert mean == pytest.approx(0.92)
    assert half == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-5)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_equals_the_combinatorial_formula(case):
    n, c, k = case
    assert stats.pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k))


def test_seeds_that_differ_much_widen_the_interval_and_raise_p():
    first = [{q: q < right for q in range(100)} for right in (60, 90)]
    second = [{q: q < 50 for q in range(100)} for _ in first]
    alone, found = stats.paired_bootstrap(first, second), stats.paired(first, second)
    assert alone.p < 0.01 < 0.2 < found.p
    assert found.low < alone.low
    assert found.high > alone.high
    assert found.p == pytest.approx(scipy.stats.ttest_1samp([0.1, 0.4], 0).pvalue)
    assert stats.paired(first[:1], second[:1]) == stats.paired_bootstrap(first[:1], second[:1])


def test_pass_at_k_bounds():
    assert stats.pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert (stats.pass_at_k(10, 3, 8), stats.pass_at_k(10, 0, 10)) == (1, 0)  # fewer wrong ones than draws; none right


def test_chance_acceptance_of_four_choices():
    assert [round(stats.chance_acceptance(4, m), 2) for m in (1, 2, 4, 8)] == [0.25, 0.44, 0.68, 0.90]  # DESIGN §5.6
    assert stats.chance_acceptance(0, 4) == 0
    assert stats.chance_acceptance(1, 1) == 1
