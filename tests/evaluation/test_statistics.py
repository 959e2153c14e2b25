"""Intervals and tests against scipy, published examples and their own definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from vlaflow.errors import ConfigError
from vlaflow.evaluation.statistics import (
    PairedOutcomes,
    Percentiles,
    mcnemar,
    paired_difference,
    sign_test,
    student,
    wilson,
)

counts = st.integers(1, 80).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
tables = st.tuples(*[st.integers(0, 40)] * 4).filter(lambda t: sum(t) > 0).map(lambda t: PairedOutcomes(*t))


@given(counts)
def test_wilson_agrees_with_scipy(count):
    successes, n = count
    theirs = scipy_stats.binomtest(successes, n).proportion_ci(0.95, "wilson")
    mine = wilson(successes, n)
    assert mine.low == pytest.approx(theirs.low, abs=1e-12)
    assert mine.high == pytest.approx(theirs.high, abs=1e-12)


def test_twenty_of_twenty_leaves_room_for_one_failure_in_six():
    """n / (n + z²), the closed form at the edge."""
    assert wilson(20, 20).low == pytest.approx(20 / (20 + 1.959963984540054**2))
    assert wilson(20, 20).high == 1.0
    assert wilson(0, 20).low == 0.0


@given(tables)
def test_mcnemar_is_the_binomial_test_on_the_discordant_pairs(table):
    discordant = table.only_first + table.only_second
    expected = scipy_stats.binomtest(table.only_second, discordant).pvalue if discordant else 1.0
    assert mcnemar(table) == pytest.approx(expected)


def test_five_to_nothing_is_one_sixteenth():
    """Two of the 2⁵ ways five coins can fall are this one-sided."""
    assert sign_test(5, 0) == 2 / 32
    assert sign_test(0, 0) == 1.0


def test_paired_difference_reproduces_a_published_example():
    """Newcombe (1998), table of examples, method 10: a = 36, b = 12, c = 2, d = 0."""
    interval = paired_difference(PairedOutcomes(both=36, only_second=12, only_first=2, neither=0))
    assert interval.low == pytest.approx(0.0569, abs=5e-5)
    assert interval.high == pytest.approx(0.3404, abs=5e-5)


@given(tables)
def test_paired_difference_holds_the_estimate_and_turns_with_the_order(table):
    interval = paired_difference(table)
    assert -1 - 1e-12 <= interval.low <= table.difference + 1e-12
    assert table.difference - 1e-12 <= interval.high <= 1 + 1e-12
    swapped = paired_difference(PairedOutcomes(table.both, table.only_second, table.only_first, table.neither))
    assert swapped.low == pytest.approx(-interval.high)


def test_pairs_are_counted_by_position():
    table = PairedOutcomes.of([True, True, False, False, True], [True, False, True, False, True])
    assert table == PairedOutcomes(2, 1, 1, 1)
    with pytest.raises(ConfigError, match="equally many"):
        PairedOutcomes.of([True], [True, False])


def test_percentiles_interpolate():
    """Of 0..100 the p-th percentile is p."""
    assert Percentiles.of(range(101)) == Percentiles(50.0, 99.0)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says(n):
    """Also of two values, where a percentile bootstrap does in half of the cases."""
    drawn = np.random.default_rng(n).normal(size=(4000, n))
    held = np.mean([interval.low <= 0 <= interval.high for interval in map(student, drawn)])
    assert 0.94 < held < 0.96


def test_the_interval_of_a_mean_is_students():
    ends = student([1.0, 2.0, 3.0, 4.0])
    assert (ends.low, ends.high) == pytest.approx((2.5 - 3.1824 * 0.6455, 2.5 + 3.1824 * 0.6455), abs=1e-3)
    assert student([3.0]) == student([3.0] * 7)
    with pytest.raises(ConfigError, match="at least one value"):
        student([])


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 4), (0, 0)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ConfigError):
        wilson(successes, n)
