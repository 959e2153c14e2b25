"""Repeated environment seeds: what repetitions add, and that the intervals keep their level."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from vlaflow.evaluation.clusters import effective_size, sign_flip_test
from vlaflow.evaluation.power import detectable_difference, pairs_needed
from vlaflow.evaluation.statistics import PairedOutcomes, mcnemar, paired_difference, wilson

outcomes = st.lists(st.integers(0, 1), min_size=1, max_size=40)
differences = st.lists(st.integers(-1, 1), min_size=1, max_size=40)
shares = st.floats(0.01, 1)


def interval(success_SR):
    found = wilson(int(success_SR.sum()), success_SR.size, effective=effective_size(success_SR))
    return found.low, found.high


def beta_binomial(random, rate, correlation, seeds, repetitions):
    """Successes whose probability varies between seeds so that two repetitions of one have this correlation."""
    scale = (1 - correlation) / correlation
    rate_S = random.beta(rate * scale, (1 - rate) * scale, seeds)
    return (random.random((seeds, repetitions)) < rate_S[:, None]).astype(int)


@given(outcomes)
def test_one_noise_seed_is_an_ordinary_sample(success_S):
    """Every episode is its own cluster; the intervals are those for independent episodes to the bit."""
    column = np.array(success_S)[:, None]
    plain = wilson(sum(success_S), len(success_S))
    assert effective_size(column) == len(success_S)
    assert interval(column) == (plain.low, plain.high)


@given(outcomes, st.integers(2, 5))
def test_identical_repetitions_add_nothing(success_S, repetitions):
    column = np.array(success_S)[:, None]
    assert interval(np.repeat(column, repetitions, 1)) == interval(column)


@given(differences, st.integers(2, 5))
def test_identical_repetitions_add_nothing_to_a_paired_test(difference_S, repetitions):
    """Neither to its p-value nor to the interval of the difference."""
    once, often = (
        PairedOutcomes(0, difference_S.count(-1) * r, difference_S.count(1) * r, difference_S.count(0) * r)
        for r in (1, repetitions)
    )
    difference_SR = np.repeat(np.array(difference_S)[:, None], repetitions, 1)
    found = paired_difference(often, effective=effective_size(difference_SR))
    expected = paired_difference(once)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert sign_flip_test(difference_SR.sum(1).tolist()) == mcnemar(once)


def test_independent_repetitions_narrow_the_interval():
    """Sixty episodes with little in common are worth nearly sixty, and never more than that."""
    success_SR = (np.random.default_rng(0).random((60, 5)) < 0.7).astype(int)
    effective = effective_size(success_SR)
    assert 200 < effective <= 300
    low, high = interval(success_SR)
    one = interval(success_SR[:, :1])
    assert high - low < 0.6 * (one[1] - one[0])


@pytest.mark.parametrize("value", [0, 1])
def test_equal_outcomes_everywhere_count_as_one_repetition(value):
    """If nothing varies, nothing is known about what repetitions share; the interval has the width of the seeds alone."""
    assert interval(np.full((20, 3), value)) == interval(np.full((20, 1), value))


def test_a_single_cluster_counts_as_one_episode():
    low, high = interval(np.array([[1, 0, 1, 1]]))
    assert high - low > 0.7


@given(st.integers(2, 12), st.integers(2, 4), st.integers(0, 2**31))
def test_the_effective_number_lies_between_seeds_and_episodes(seeds, repetitions, seed):
    success_SR = np.random.default_rng(seed).integers(0, 2, (seeds, repetitions))
    assert seeds <= effective_size(success_SR) <= seeds * repetitions


def test_with_many_seeds_the_interval_is_that_of_a_cluster_bootstrap():
    """The two agree where a bootstrap is reliable: 400 clusters, a rate away from 0 and 1."""
    success_SR = beta_binomial(np.random.default_rng(1), 0.6, 0.5, 400, 3)
    theirs = scipy_stats.bootstrap(
        (success_SR.mean(1),), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(0)
    ).confidence_interval
    # an end of a bootstrap of 4000 draws has a standard error of about 3 % of the half-width, which is 0.04 here
    assert interval(success_SR) == pytest.approx((theirs.low, theirs.high), abs=0.005)


@pytest.mark.parametrize(("rate", "correlation"), [(0.5, 0.3), (0.5, 0.7), (0.8, 0.3), (0.8, 0.7), (0.95, 0.5)])
def test_intervals_keep_their_level(rate, correlation):
    """Coverage over 600 simulated evaluations of 20 seeds × 3; its standard error is below 1 % at 95 %."""
    random, covered, naive = np.random.default_rng(7), 0, 0
    for _ in range(600):
        success_SR = beta_binomial(random, rate, correlation, 20, 3)
        low, high = interval(success_SR)
        plain = wilson(int(success_SR.sum()), success_SR.size)
        covered += low <= rate <= high
        naive += plain.low <= rate <= plain.high
    assert 0.92 <= covered / 600 <= 0.99
    assert naive / 600 < 0.92, "a simulation in which ignoring the clusters does no harm tests nothing"


def test_intervals_of_clusters_of_different_sizes_keep_their_level():
    """Fifteen episodes, with 4 to 24 questions each; accuracy varies between episodes."""
    random, covered, naive = np.random.default_rng(5), 0, 0
    for _ in range(600):
        sizes = random.integers(4, 25, 15)
        clusters = [beta_binomial(random, 0.8, 1 / 6, 1, size)[0] for size in sizes]
        right, n = sum(int(each.sum()) for each in clusters), int(sizes.sum())
        found, plain = wilson(right, n, effective=effective_size(clusters)), wilson(right, n)
        covered += found.low <= 0.8 <= found.high
        naive += plain.low <= 0.8 <= plain.high
    assert 0.92 <= covered / 600 <= 0.99
    assert naive / 600 < 0.85


def test_the_paired_interval_keeps_its_level():
    """Two policies on shared scenes, 30 seeds × 3: in 0.5 and 0.8 of the scenes they succeed with 0.95, elsewhere with 0.05.

    The mean of two uniform numbers is below x > 1/2 with probability 1 − 2 (1 − x)².
    """
    random, covered, naive, truth = np.random.default_rng(3), 0, 0, 0.9 * (0.8 - 0.5)
    limits = (0.5, 1 - math.sqrt(0.1))
    for _ in range(600):
        scene_S, own_S = random.random(30), random.random((2, 30))
        rate_2S = np.stack([(0.5 * scene_S + 0.5 * own < limit) for own, limit in zip(own_S, limits, strict=True)])
        success = (random.random((3, 2, 30)) < np.where(rate_2S, 0.95, 0.05)).astype(int)
        first_SR, second_SR = success[:, 0].T, success[:, 1].T
        table = PairedOutcomes.of(first_SR.ravel().tolist(), second_SR.ravel().tolist())
        found = paired_difference(table, effective=effective_size(second_SR - first_SR))
        plain = paired_difference(table)
        covered += found.low <= truth <= found.high
        naive += plain.low <= truth <= plain.high
    assert 0.92 <= covered / 600 <= 0.99
    assert naive / 600 < 0.9


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=10))
def test_the_permutation_test_agrees_with_scipy(difference_S):
    if not any(difference_S):
        assert sign_flip_test(difference_S) == 1
        return
    theirs = scipy_stats.permutation_test(
        (np.array(difference_S, float),), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_test(difference_S) == pytest.approx(theirs.pvalue)


@given(differences)
def test_one_noise_seed_is_mcnemars_test_to_the_bit(difference_S):
    table = PairedOutcomes(0, difference_S.count(-1), difference_S.count(1), difference_S.count(0))
    assert sign_flip_test(difference_S) == mcnemar(table)


@given(shares, st.integers(5, 500))
def test_the_detectable_difference_needs_as_many_pairs_as_there_are(disagreement, pairs):
    """Detectable difference and needed number are inverses; rounding up adds less than one pair."""
    found = detectable_difference(disagreement, pairs)
    assert 0 < found <= 1
    assert pairs_needed(disagreement, found * (1 - 1e-9)) in (pairs, pairs + 1)
    assert detectable_difference(disagreement, 2 * pairs) < found


@pytest.mark.parametrize(("pairs", "disagreement"), [(20, 0.3), (40, 0.2), (120, 0.25), (400, 0.1)])
def test_a_detectable_difference_is_found_four_times_in_five(pairs, disagreement):
    """Exact power of McNemar's test there; it is a little conservative, so the approximation is up to a tenth too hopeful."""
    difference = detectable_difference(disagreement, pairs)
    share = max(disagreement, difference)
    power, wins = 0.0, 0.5 + difference / (2 * share)
    for k in range(pairs + 1):
        tail_K = scipy_stats.binom.cdf(np.arange(k + 1), k, 0.5)
        critical = int((2 * tail_K <= 0.05).sum())  # splits with fewer wins than this, on either side, are significant
        lower, upper = scipy_stats.binom.cdf([critical - 1, k - critical], k, wins)
        power += scipy_stats.binom.pmf(k, pairs, share) * (lower + 1 - upper if critical else 0)
    assert 0.7 < power < 0.85


def test_a_difference_of_nothing_needs_no_number_and_few_pairs_show_nothing():
    assert pairs_needed(0.3, 0.0) is None
    assert detectable_difference(0.5, 3) == 1.0
    assert math.isclose(detectable_difference(0.0, 20), detectable_difference(1e-12, 20))
