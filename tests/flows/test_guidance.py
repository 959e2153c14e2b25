"""Guidance: where it is exact, where it does nothing, and how strong it may become."""

import math

import pytest
import torch

from vlaflow.flows import guidance


def test_the_soft_mask_is_one_then_falls_then_ends():
    weight_BL = guidance.soft_mask(8, torch.tensor([2, 0, 8]), torch.tensor([5, 0, 8]))
    assert weight_BL[0, :2].tolist() == [1, 1]
    assert weight_BL[0, 5:].tolist() == [0, 0, 0]
    assert (weight_BL[0, 2:5].diff() < 0).all()
    c = 3 / 4  # three of the four intervals between the last committed action and the last known one
    assert float(weight_BL[0, 2]) == pytest.approx(c * math.expm1(c) / math.expm1(1))
    assert weight_BL[1].tolist() == [0] * 8
    assert weight_BL[2].tolist() == [1] * 8


def test_the_strength_is_the_papers_and_bounded_at_both_ends():
    clock = torch.tensor([0.0, 0.25, 0.5, 1.0])
    # r² = t²/(t² + (1 − t)²) and t/((1 − t)·r²), written once more from the paper
    r2 = clock**2 / (clock**2 + (1 - clock) ** 2)
    paper = clock / ((1 - clock) * r2)
    torch.testing.assert_close(guidance.strength(clock)[1:3], paper[1:3])
    assert guidance.strength(clock)[[0, 3]].tolist() == [guidance.BOUND] * 2
    assert float(guidance.strength(torch.tensor(0.5), bound=1.5)) == 1.5


def test_the_pull_of_a_linear_velocity_is_its_transposed_matrix():
    """For u = A·x the estimate is (1 − t·A)·x, so Jᵀ is (1 − t·A)ᵀ, here across tokens and dimensions at once."""
    generator = torch.Generator().manual_seed(0)
    a_XX, x = torch.randn(6, 6, generator=generator), torch.randn(1, 3, 2, generator=generator).requires_grad_()
    known, weight = torch.randn(1, 3, 2, generator=generator), torch.tensor([[1.0, 0.5, 0.0]])
    t = 0.4
    velocity = (x.flatten() @ a_XX.T).view(1, 3, 2)
    bent = guidance.guided(x, velocity, torch.full((1, 3), t), known, weight)
    jacobian = torch.eye(6) - t * a_XX
    error = (weight[..., None] * (known - (jacobian @ x.flatten()).view(1, 3, 2))).flatten()
    expected = velocity.flatten() - float(guidance.strength(torch.tensor(t))) * (jacobian.T @ error)
    torch.testing.assert_close(bent.flatten(), expected.detach())
    assert not bent.requires_grad


def test_no_weight_means_no_pull():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    velocity = x.tanh()
    bent = guidance.guided(x, velocity, torch.full((2, 3), 0.5), torch.zeros(2, 3, 4), torch.zeros(2, 3))
    torch.testing.assert_close(bent, velocity.detach(), rtol=0, atol=0)
