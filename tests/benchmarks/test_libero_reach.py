"""Whether a hand follows the object or always goes to the same place."""

import numpy as np
import pytest

from benchmarks.libero_reach import measured


@pytest.fixture
def places():
    return np.random.default_rng(0).normal(0.0, 0.012, (200, 2))


def test_a_hand_that_follows_at_a_distance_has_slope_1_and_no_miss(places):
    reach = measured("t", (places, places + np.array([0.02, -0.01])))
    assert reach.slope == pytest.approx(1)
    assert reach.miss == pytest.approx(0, abs=1e-9)
    assert reach.error == pytest.approx(0, abs=1e-9)
    assert reach.spread == pytest.approx(12, rel=0.1)


def test_a_hand_that_always_goes_to_the_same_place_has_slope_0_and_misses_by_the_spread(places):
    reach = measured("t", (places, np.zeros_like(places) + 0.3))
    assert reach.slope == pytest.approx(0)
    assert reach.miss == pytest.approx(reach.spread)


def test_the_error_of_the_slope_covers_it(places):
    """Noise of 6 mm on a hand that goes half of the way: two standard deviations hold 95 of 100 slopes."""
    noise = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        reach = measured("t", (places[:20], 0.5 * places[:20] + noise.normal(0, 0.006, (20, 2))))
        inside += abs(reach.slope - 0.5) < 2 * reach.error
    assert 88 <= inside <= 100


def test_several_tasks_are_compared_within_each():
    """Objects of two tasks stand half a metre apart, and the hand goes to each task's mean."""
    first = np.random.default_rng(2).normal(0.0, 0.012, (50, 2))
    pairs = [(first + place, np.zeros((50, 2)) + place) for place in (0.0, 0.5)]
    assert measured("all", *pairs).slope == pytest.approx(0, abs=1e-9)
