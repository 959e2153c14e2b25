"""Shares leave as asked, the last exit always fires, and a bound on the risk is kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaflow.compute.thresholds import exit_shares, filtered_quantiles, risk_controlled, taken
from vlaflow.errors import ConfigError

DISTRIBUTIONS = ("exponential", "gaussian", "gamma")


def synthetic(samples, exits=5, seed=0):
    """Discrepancies that fall with depth and say something of the deviation, as real ones do."""
    random = np.random.default_rng(seed)
    hardness_N1 = random.gamma(2.0, 1.0, (samples, 1))
    fall_K = 0.5 ** np.arange(exits)
    discrepancy_NK = hardness_N1 * fall_K * random.lognormal(0, 0.5, (samples, exits))
    deviation_NK = hardness_N1 * fall_K * random.lognormal(0, 0.5, (samples, exits))
    deviation_NK[:, -1] = 0
    return discrepancy_NK, deviation_NK


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("budget", [0.1, 0.4, 1.0, 2.0])
def test_shares_in_closed_form(distribution, budget):
    share_K = exit_shares(distribution, budget, 4)
    k = np.arange(1, 5)
    wanted = {
        "exponential": budget**k,
        "gaussian": np.exp(-((k - 1 - budget) ** 2) / 2),
        "gamma": k ** (budget - 1) * np.exp(-k / 2),
    }[distribution]
    np.testing.assert_allclose(share_K, wanted / wanted.sum(), rtol=1e-12)
    later_K = exit_shares(distribution, budget, 4, first_exit=False)
    assert later_K[0] == 0
    np.testing.assert_allclose(later_K[1:], wanted[1:] / wanted[1:].sum(), rtol=1e-12)


def test_the_published_mean_depths_follow_from_the_shares():
    """A1's 14 exits at 2, 4, … 28 layers, the first never taken: what budgets 1, 0.8, 0.7, 0.4 and 0.1 mean."""
    depth_K = np.arange(2, 29, 2)
    found = [float(exit_shares("exponential", c, 14, first_exit=False) @ depth_K / 28) for c in (1.0, 0.8, 0.7, 0.4, 0.1)]
    np.testing.assert_allclose(found, [0.57, 0.38, 0.30, 0.19, 0.15], atol=0.015)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_shares_of_fresh_data_equal_the_target_within_sampling_error(distribution):
    share_K = exit_shares(distribution, 0.8, 5)
    threshold_K = filtered_quantiles(synthetic(20_000)[0], share_K)
    seen_K = np.bincount(taken(synthetic(20_000, seed=1)[0], threshold_K), minlength=5) / 20_000
    np.testing.assert_allclose(seen_K, share_K, atol=5 * np.sqrt(0.25 / 20_000) * 1.5)


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 10_000), st.sampled_from([2, 5, 1000]))
def test_on_its_own_samples_no_more_leave_than_asked_but_for_ties(samples, exits, seed, values):
    random = np.random.default_rng(seed)
    discrepancy_NK = random.integers(0, values, (samples, exits)) / values
    share_K = random.dirichlet(np.ones(exits))
    threshold_K = filtered_quantiles(discrepancy_NK, share_K)
    exit_N = taken(discrepancy_NK, threshold_K)
    assert threshold_K[-1] == np.inf
    assert ((exit_N >= 0) & (exit_N < exits)).all()
    gone = np.zeros(samples, bool)
    for k in range(exits - 1):
        leaves = exit_N == k
        wanted = int(np.floor(samples * share_K[: k + 1].sum() + 1e-9)) - gone.sum()
        if wanted >= 1 and share_K[k] > 0:
            # without those who tie with the threshold itself, fewer than asked have left
            assert (leaves & (discrepancy_NK[:, k] < threshold_K[k])).sum() < wanted <= leaves.sum() or not (~gone).any()
        else:
            assert not leaves.any()
        gone |= leaves


def test_equal_discrepancies_leave_together_and_later_exits_make_up_for_it():
    discrepancy_NK = np.array([[0.0, 0.3, 0], [0.0, 0.2, 0], [0.0, 0.1, 0], [0.5, 0.4, 0]])
    threshold_K = filtered_quantiles(discrepancy_NK, np.array([0.25, 0.5, 0.25]))
    assert taken(discrepancy_NK, threshold_K).tolist() == [0, 0, 0, 2]
    assert threshold_K[1] == -np.inf


def test_a_smaller_budget_never_goes_deeper():
    discrepancy_NK, _ = synthetic(4000)
    depths = [
        taken(discrepancy_NK, filtered_quantiles(discrepancy_NK, exit_shares("exponential", c, 5))).mean()
        for c in (0.1, 0.4, 0.8, 1.0, 2.0)
    ]
    assert depths == sorted(depths)


def risk_of(threshold_K, epsilon, seed=99, samples=40_000):
    discrepancy_NK, deviation_NK = synthetic(samples, seed=seed)
    return float((deviation_NK[np.arange(samples), taken(discrepancy_NK, threshold_K)] > epsilon).mean())


def test_a_bound_on_the_risk_is_kept_in_at_least_95_of_100_calibrations_and_used():
    epsilon, risk, kept, used = 1.0, 0.1, 0, []
    for seed in range(100):
        discrepancy_NK, deviation_NK = synthetic(600, seed=1000 + seed)
        tuning_N = np.random.default_rng(seed).permutation(600) < 300
        threshold_K = risk_controlled(
            discrepancy_NK, deviation_NK, max_deviation=epsilon, risk=risk, error=0.05, tuning_N=tuning_N
        )
        true = risk_of(threshold_K, epsilon)
        kept += true <= risk
        used.append(true)
    assert kept >= 95
    assert np.mean(used) > 0.4 * risk  # not by never leaving


def test_exchanging_test_and_tuning_samples_would_break_the_promise():
    """The property has teeth: thresholds chosen on the very samples that judge them exceed the risk far more often."""
    broken = 0
    for seed in range(100):
        discrepancy_NK, deviation_NK = synthetic(60, seed=1000 + seed)
        best = np.array([-np.inf] * 4 + [np.inf])
        for level in np.linspace(0.01, 1, 100):
            threshold_K = np.quantile(discrepancy_NK, level, axis=0)
            threshold_K[-1] = np.inf
            if (deviation_NK[np.arange(60), taken(discrepancy_NK, threshold_K)] > 1.0).mean() <= 0.1:
                best = threshold_K
        broken += risk_of(best, 1.0) > 0.1
    assert broken > 20


def test_where_nothing_is_safe_no_more_leave_early_than_the_risk_allows():
    discrepancy_NK, deviation_NK = synthetic(200)
    deviation_NK[:, :-1] = 9
    tuning_N = np.arange(200) < 100
    threshold_K = risk_controlled(discrepancy_NK, deviation_NK, max_deviation=1.0, risk=0.1, tuning_N=tuning_N)
    assert (taken(discrepancy_NK, threshold_K) < 4).mean() <= 0.1
    none_K = risk_controlled(discrepancy_NK, deviation_NK, max_deviation=1.0, risk=0.01, tuning_N=tuning_N)
    assert none_K.tolist() == [-np.inf] * 4 + [np.inf]  # 100 samples cannot prove so small a risk


@pytest.mark.parametrize(
    "wrong",
    [
        lambda d, v, t: exit_shares("exponential", 0, 3),
        lambda d, v, t: exit_shares("exponential", 0.5, 1, first_exit=False),
        lambda d, v, t: filtered_quantiles(d * np.nan, np.ones(5) / 5),
        lambda d, v, t: filtered_quantiles(d[:0], np.ones(5) / 5),
        lambda d, v, t: risk_controlled(d, v, max_deviation=1, risk=1.5, tuning_N=t),
        lambda d, v, t: risk_controlled(d, v + 1, max_deviation=1, risk=0.1, tuning_N=t),
        lambda d, v, t: risk_controlled(d, v, max_deviation=1, risk=0.1, tuning_N=t | True),
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    discrepancy_NK, deviation_NK = synthetic(20)
    with pytest.raises(ConfigError):
        wrong(discrepancy_NK, deviation_NK, np.arange(20) < 10)
