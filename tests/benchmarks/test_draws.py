"""What the draws of a sampler say of it."""

import pytest
import torch

from benchmarks.draws import moments


def test_moments_are_those_of_the_distribution_whatever_the_number_of_draws():
    """Draws of variance 4 whose mean is off by 3: errors 13 and 9; what is not valid does not count."""
    generator = torch.Generator().manual_seed(0)
    target_BHD = torch.randn(500, 4, 5, generator=generator)
    valid_BH = torch.arange(4).expand(500, 4) < 3
    for draws in (2, 16):
        chunk_BKHD = target_BHD[:, None] + 3 + 2 * torch.randn(500, draws, 4, 5, generator=generator)
        chunk_BKHD[:, :, 3] = 1e3
        error, of_mean, variance, count = moments(chunk_BKHD, target_BHD, valid_BH)
        assert count == 1500
        assert (error / count, of_mean / count, variance / count) == pytest.approx((13, 9, 4), rel=0.05)
