"""Straight paths have closed forms; these are they."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vlaflow.flows import gaussian

seeds = st.integers(0, 2**31)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40)
@given(steps=st.integers(1, 40), seed=seeds)
def test_exact_velocity_reaches_the_action_in_any_number_of_steps(steps, seed):
    """Along a straight path one Euler step of any size is exact; only rounding is left (float32, 40 additions)."""
    action, noise = draw(seed, 2, 5, 3), draw(seed + 1, 2, 5, 3)
    clock = torch.rand(2, 5, generator=torch.Generator().manual_seed(seed))
    x = gaussian.interpolate(action, noise, clock)
    for i in range(steps):
        x = gaussian.step(x, gaussian.velocity_target(action, noise), clock * (1 - i / steps), clock * (1 - (i + 1) / steps))
    torch.testing.assert_close(x, action, atol=2e-5, rtol=0)


@settings(max_examples=40)
@given(seed=seeds)
def test_clean_tokens_pass_interpolation_and_steps_unchanged_to_the_bit(seed):
    """Committed actions must come back as they went in, even −0.0 and next to a velocity that is not a number."""
    action, noise = draw(seed, 3, 6, 2), draw(seed + 1, 3, 6, 2)
    action[0, 0] = -0.0
    mask = (torch.rand(3, 6, generator=torch.Generator().manual_seed(seed)) < 0.5).float()
    mask[0, 0] = 0
    x = gaussian.interpolate(action, noise, mask)
    moved = gaussian.step(x, torch.full_like(x, float("nan")), mask, mask * 0.9)
    kept = mask == 0
    assert torch.equal(moved[kept].view(torch.int32), action[kept].view(torch.int32))


def test_an_all_ones_mask_is_the_synchronous_path_bit_for_bit():
    action, noise, time = draw(0, 4, 8, 3), draw(1, 4, 8, 3), torch.rand(4, 1)
    asynchronous = gaussian.interpolate(action, noise, time * torch.ones(4, 8))
    synchronous = gaussian.interpolate(action, noise, time.expand(4, 8))
    assert torch.equal(asynchronous, synchronous)


def test_training_times_follow_the_beta_distribution():
    """Kolmogorov–Smirnov against scipy's Beta(1.5, 1); the faulty ratio-of-powers sampler (mean 0.558) fails it."""
    generator = torch.Generator().manual_seed(0)
    time = gaussian.sample_time((20_000,), generator, alpha=1.5, floor=0.0).numpy()
    assert stats.kstest(time, stats.beta(1.5, 1).cdf).pvalue > 0.01
    u, v = torch.rand(20_000, generator=generator) ** (1 / 1.5), torch.rand(20_000, generator=generator)
    assert stats.kstest((u / (u + v)).numpy(), stats.beta(1.5, 1).cdf).pvalue < 1e-6


def test_masks_have_a_uniform_number_of_ones():
    """Mixing Bernoulli(y) over y ~ U(0, 1) makes every count 0..L equally likely (a Beta-binomial with a = b = 1)."""
    mask = gaussian.sample_mask(20_000, 4, torch.Generator().manual_seed(0))
    counts = torch.bincount(mask.sum(1).long(), minlength=5).numpy()
    assert stats.chisquare(counts).pvalue > 0.01


def test_a_share_of_the_masks_can_be_whole():
    """P(all ones) = whole + (1 − whole)/(L + 1), and the rest stays uniform in its number of ones."""
    mask = gaussian.sample_mask(20_000, 4, torch.Generator().manual_seed(0), whole=0.5)
    counts = torch.bincount(mask.sum(1).long(), minlength=5).numpy()
    assert stats.chisquare(counts, [2000, 2000, 2000, 2000, 12000]).pvalue > 0.01
    assert gaussian.sample_mask(100, 4, torch.Generator().manual_seed(0), whole=1.0).all()


def test_excluded_tokens_do_not_touch_the_loss_or_its_gradient():
    error = draw(0, 2, 4, 3).requires_grad_()
    weight = torch.tensor([[1.0, 1, 0, 0], [1, 0, 1, 0]])
    with torch.no_grad():
        error[0, 2] = float("nan")
    loss = gaussian.masked_mean_square(error, weight)
    loss.backward()
    assert torch.isclose(loss, error.detach()[weight > 0].square().mean())
    assert torch.all(error.grad[weight == 0] == 0)


def test_a_batch_with_nothing_to_learn_has_zero_loss():
    assert gaussian.masked_mean_square(draw(0, 2, 4, 3), torch.zeros(2, 4)) == 0


def test_noise_of_an_item_does_not_depend_on_its_neighbours():
    make = torch.Generator().manual_seed
    alone = gaussian.standard_normal([make(5)], (3, 2))
    together = gaussian.standard_normal([torch.Generator().manual_seed(i) for i in (4, 5, 6)], (3, 2))
    assert torch.equal(alone[0], together[1])


def test_skewed_times_have_the_median_of_their_law():
    """1 / (1 + exp(-1.2)); the sample's median is within four deviations of it (0.25 / (density 0.374 · √40 000) each)."""
    time_N = gaussian.sample_skewed_time((40_000,), torch.Generator().manual_seed(0))
    assert time_N.median().item() == pytest.approx(1 / (1 + math.exp(-1.2)), abs=0.008)
    assert 1e-4 <= time_N.min() < time_N.max() <= 1
