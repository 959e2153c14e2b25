"""Draws in two groups, in one, and what the measure must not depend on."""

import math

import pytest
import torch
from torch import Generator

from vlaflow.compute.multimodality import multimodality
from vlaflow.errors import ConfigError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("left", "right"), [(4, 4), (1, 3), (7, 1), (30, 20)])
def test_two_values_in_any_proportion_are_one(left, right):
    """Kurtosis = skewness² + 1 holds for distributions of two values and for no other."""
    one, other = normal(2, 16, 4)
    draw_BKLD = torch.stack([one] * left + [other] * right)[None]
    assert multimodality(draw_BKLD).item() == pytest.approx(1, abs=1e-9)


def test_normal_draws_are_near_zero_whatever_their_number_and_dimensions():
    """Before clipping their mean is 0; clipped it is below a sixth, and falls with the number of draws."""
    for shape in ((16, 4), (1, 1)):
        found = [multimodality(normal(2000, draws, *shape)).mean().item() for draws in (8, 64)]
        assert found[1] < found[0] < 1 / 6
        assert found[1] < 0.07


@pytest.mark.parametrize("distance", [1.0, 2.0, 4.0])
def test_two_normal_groups_have_the_value_of_their_moments(distance):
    """Groups at ±a with standard deviation 1: no skewness, kurtosis (a⁴ + 6a² + 3) / (a² + 1)², and b₀ = 1/3 for many draws."""
    rank_K = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    group_K = math.sqrt(2) * torch.erfinv(2 * rank_K - 1)  # equally probable parts of a normal distribution
    draw_BKLD = torch.cat([group_K - distance, group_K + distance]).view(1, -1, 1, 1)
    kurtosis = (distance**4 + 6 * distance**2 + 3) / (distance**2 + 1) ** 2
    # 500 parts lack 1 % of the normal kurtosis in their tails
    assert multimodality(draw_BKLD).item() == pytest.approx(1.5 * (1 / kurtosis - 1 / 3), abs=0.02)


def test_groups_that_differ_in_one_direction_are_found_among_many_dimensions():
    """Two groups six standard deviations apart in one of 64 directions; eight draws of each of 500 observations."""
    side_BK = torch.where(torch.rand(500, 8, generator=Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    direction_LD = torch.zeros(16, 4, dtype=torch.float64)
    direction_LD[3, 1] = 1
    draws = normal(500, 8, 16, 4)
    together = multimodality(draws).mean()
    apart = multimodality(draws + 6 * side_BK[..., None, None] * direction_LD).mean()
    assert apart > 0.8
    assert together < 0.2


def test_neither_order_nor_scale_nor_place_matters():
    draw_BKLD = normal(20, 9, 16, 4)
    expected = multimodality(draw_BKLD)
    shuffled = draw_BKLD[:, torch.randperm(9, generator=Generator().manual_seed(2))]
    for same in (shuffled, 1e-3 * draw_BKLD, draw_BKLD + 5, -draw_BKLD):
        torch.testing.assert_close(multimodality(same), expected, rtol=0, atol=1e-6)


def test_equal_draws_are_zero_and_each_observation_has_its_own_value():
    draw_BKLD = normal(3, 8, 16, 4).float()
    draw_BKLD[1] = draw_BKLD[1, :1]
    found = multimodality(draw_BKLD)
    assert found[1] == 0
    assert found.dtype == torch.float32
    for i in range(3):
        torch.testing.assert_close(multimodality(draw_BKLD[i : i + 1])[0], found[i])


def test_a_uniform_distribution_is_a_third():
    """Kurtosis 9/5: 1.5 · (5/9 − 1/3)."""
    line = torch.linspace(-1, 1, 1001, dtype=torch.float64).view(1, -1, 1, 1)
    assert math.isclose(multimodality(line).item(), 1 / 3, abs_tol=0.01)


def test_three_draws_are_refused():
    with pytest.raises(ConfigError, match="at least 4 draws"):
        multimodality(normal(1, 3, 2, 2))
