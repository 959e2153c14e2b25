"""Straight-line flow matching between noise and actions, with a clock per token.

Clock 1 is pure noise, 0 is the action: x_t = t·noise + (1 − t)·action, velocity u = noise − action. Tokens may carry
different clocks: all equal is ordinary (synchronous) flow matching; 1 on some and 0 on the rest is AsyncVLA's
regeneration; 0 on committed actions is real-time chunking.

Shape letters: B batch, L chunk size, D action dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from vlaflow.flows.sampling import Solver


def interpolate(action_BLD: Tensor, noise_BLD: Tensor, clock_BL: Tensor) -> Tensor:
    """Point on the straight path from noise to action, token by token.

    x_t = t·noise + (1 − t)·action (AsyncVLA eq. 5 with t = τ·m; A1's time runs in the opposite direction). A token
    with clock 0 is returned unchanged, bit for bit.

    Args:
        action_BLD: normalised actions, (B, L, D).
        noise_BLD: standard normal, same shape.
        clock_BL: noise level per token in [0, 1]; 1 is pure noise.
    """
    t_BL1 = clock_BL[..., None]
    return torch.where(t_BL1 == 0, action_BLD, t_BL1 * noise_BLD + (1 - t_BL1) * action_BLD)


def velocity_target(action_BLD: Tensor, noise_BLD: Tensor) -> Tensor:
    """u = dx/dt = noise − action, constant along the path (AsyncVLA eq. 4)."""
    return noise_BLD - action_BLD


def step(x_BLD: Tensor, velocity_BLD: Tensor, from_BL: Tensor, to_BL: Tensor) -> Tensor:
    """One Euler step of every token from its clock to a lower one: x + (to − from)·velocity (AsyncVLA eq. 1).

    A token whose clock does not change is returned unchanged, bit for bit, whatever its velocity.
    """
    delta_BL1 = (to_BL - from_BL)[..., None]
    return torch.where(delta_BL1 == 0, x_BLD, x_BLD + delta_BL1 * velocity_BLD)


def solver_step(
    solver: Solver,
    x_BLD: Tensor,
    velocity: Callable[[Tensor, Tensor], Tensor],
    from_BL: Tensor,
    to_BL: Tensor,
    *,
    last: bool,
) -> Tensor:
    """One step of dx/dt = velocity(x, t) of every token from its clock to a lower one.

    euler: local error O(h²), one evaluation; midpoint and heun: O(h³), two. The last step of heun ends where no velocity is
    known and is Euler's.

    Args:
        solver: see ``Solver``.
        x_BLD: tokens at their clocks.
        velocity: (B, L, D) and clocks (B, L) to velocities (B, L, D), float32.
        from_BL, to_BL: clocks; a token whose clock does not move is returned unchanged to the bit.
        last: whether the step ends at clock 0.
    """
    first_BLD = velocity(x_BLD, from_BL)
    if solver == "midpoint":
        half_BL = (from_BL + to_BL) / 2
        return step(x_BLD, velocity(step(x_BLD, first_BLD, from_BL, half_BL), half_BL), from_BL, to_BL)
    if solver == "heun" and not last:
        second_BLD = velocity(step(x_BLD, first_BLD, from_BL, to_BL), to_BL)
        return step(x_BLD, (first_BLD + second_BLD) / 2, from_BL, to_BL)
    return step(x_BLD, first_BLD, from_BL, to_BL)


def sample_time(shape: Sequence[int], generator: Generator, alpha: float = 1.5, floor: float = 0.001) -> Tensor:
    """Training noise levels: floor + (1 − floor)·b with b ~ Beta(α, 1), drawn exactly as U^(1/α).

    The mean of Beta(1.5, 1) is 0.6: noisier levels are sampled more often. (The ratio of powers of two uniforms without
    Jöhnk's acceptance test, as in some public code, is not Beta distributed: its mean is 0.558.)
    """
    return floor + (1 - floor) * torch.rand(tuple(shape), generator=generator) ** (1 / alpha)


def sample_skewed_time(shape: Sequence[int], generator: Generator, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Training noise levels 1 / (1 + σ) with ln σ ~ N(mean, std²), in [1e-4, 1]: iFlyBot-VLA's code, on request.

    The median is 1 / (1 + exp(mean)) = 0.769, so noisy levels are sampled more often than by Beta(1.5, 1).
    """
    sigma = (mean + std * torch.randn(tuple(shape), generator=generator)).exp()
    return (1 / (1 + sigma)).clamp(1e-4, 1)


def sample_mask(batch: int, chunk_size: int, generator: Generator, whole: float = 0.0) -> Tensor:
    """AsyncVLA's unified training mask: y ~ U(0, 1) per sample, then m_l ~ Bernoulli(y) per token (Alg. 2).

    Args:
        batch, chunk_size: B and L.
        generator: the source of randomness.
        whole: probability, beyond the paper's, that a sample has y = 1, so that all its tokens are noised; the others keep
            y ~ U(0, 1).

    Returns:
        float (B, L): 1 where a token is noised and learned, 0 where it is clean context.
    """
    y_B1 = torch.rand(batch, 1, generator=generator)
    y_B1 = y_B1 / (1 - whole) if whole < 1 else torch.ones_like(y_B1)
    return (torch.rand(batch, chunk_size, generator=generator) < y_B1).float()


def sample_beginning(batch: int, chunk_size: int, longest: int, generator: Generator, whole: float = 0.0) -> Tensor:
    """Training mask of real-time chunking: the first n tokens of each sample are clean, n uniform in 0 … ``longest``.

    Args:
        batch, chunk_size: B and L.
        longest: at most L.
        generator: the source of randomness.
        whole: probability that a sample has no clean tokens. Without it the first actions of a chunk are rarely learned: the
            i-th is noised in i of ``longest`` + 1 samples.

    Returns:
        float (B, L): 1 where a token is noised and learned, 0 on the clean prefix.
    """
    count_B1 = torch.randint(longest + 1, (batch, 1), generator=generator)
    clean_B1 = torch.rand(batch, 1, generator=generator) >= whole
    return (torch.arange(chunk_size)[None] >= count_B1 * clean_B1).float()


def masked_mean_square(error_BLD: Tensor, weight_BL: Tensor, mask_BLD: Tensor | None = None) -> Tensor:
    """Mean of error² over the tokens with weight 1; exactly 0, with zero gradient, when there are none.

    (The paper divides by the batch size; dividing by the number of learned elements makes the learning rate independent of
    masks, padding and pauses.)

    Args:
        error_BLD: errors.
        weight_BL: 1 where a token counts, else 0.
        mask_BLD: bool, False in dimensions that the sample's robot lacks. Each token counts by the mean over its own
            dimensions, so that a robot with few of them weighs as much as one with many. None for all.
    """
    # where() before the square: an excluded error must affect neither the sum nor the gradient, finite or not
    learned_BLD = torch.where(weight_BL[..., None] > 0, error_BLD.float(), 0.0)
    if mask_BLD is not None:
        square_BL = torch.where(mask_BLD, learned_BLD, 0.0).square().sum(-1) / mask_BLD.sum(-1).clamp(min=1)
        return square_BL.sum() / weight_BL.sum().clamp(min=1)
    return learned_BLD.square().sum() / (weight_BL.sum() * error_BLD.shape[-1]).clamp(min=1)


def standard_normal(generators: Sequence[Generator], shape: Sequence[int], scale: float = 1.0) -> Tensor:
    """Noise (B, *shape) for a batch in which every item has its own generator, so that it does not depend on its batch.

    It is drawn where the generators live. It is multiplied by ``scale``; at 0 they advance all the same, so that what is drawn
    later is the same.
    """
    noise = torch.stack([torch.randn(tuple(shape), generator=g, device=g.device) for g in generators])
    return scale * noise if scale else torch.zeros_like(noise)  # 0 · noise would keep the noise's sign
