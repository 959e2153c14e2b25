"""Targets of consistency distillation against flows whose solution is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaflow.errors import ConfigError
from vlaflow.flows import gaussian
from vlaflow.flows.consistency import Consistency

TWO = Consistency(2)
clocks = st.floats(0, 1, width=32)
seeds = st.integers(0, 2**31)


def tokens(seed, *, clean=()):
    generator = torch.Generator().manual_seed(seed)
    x_BLX = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    clock_BL = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    clock_BL[:, list(clean)] = 0
    return x_BLX, clock_BL


class Normal:
    """The flow between noise and actions that are normal with this mean and deviation, in closed form."""

    mean, deviation = 0.7, 0.3

    def spread(self, clock_BL):
        return (clock_BL.square() + ((1 - clock_BL) * self.deviation).square()).sqrt()[..., None]

    def velocity(self, x_BLX, clock_BL):
        """E[noise − action | x] along x = t·noise + (1 − t)·action."""
        t_BL1 = clock_BL[..., None]
        centred_BLX = (x_BLX - (1 - t_BL1) * self.mean) / self.spread(clock_BL).square()
        return t_BL1 * centred_BLX - self.mean - (1 - t_BL1) * self.deviation**2 * centred_BLX

    def at(self, x_BLX, from_BL, to_BL):
        """Where a trajectory through x is at another clock: as many deviations from the mean as before."""
        ratio_BL1 = self.spread(to_BL) / self.spread(from_BL)
        return (1 - to_BL[..., None]) * self.mean + ratio_BL1 * (x_BLX - (1 - from_BL[..., None]) * self.mean)

    def jump(self, consistency):
        """The velocity that leads to the end of a segment in one step."""

        def velocity(x_BLX, clock_BL):
            end_BL = consistency.end(clock_BL)
            return (x_BLX - self.at(x_BLX, clock_BL, end_BL)) / (clock_BL - end_BL).clamp(min=1e-12)[..., None]

        return velocity


@given(clock=clocks, steps=st.integers(1, 9))
@settings(max_examples=40)
def test_a_segment_ends_below_its_clocks_and_not_further_than_a_step(clock, steps):
    end = float(Consistency(steps).end(torch.tensor([[clock]])))
    assert end < clock or end == clock == 0
    assert clock - end <= 1 / steps + 1e-6
    assert end * steps == pytest.approx(round(end * steps), abs=1e-5)


def test_the_end_of_a_segment_belongs_to_the_segment_below():
    assert TWO.end(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])).tolist() == [0.5, 0.5, 0, 0, 0]


@given(seed=seeds)
@settings(max_examples=20)
def test_the_estimate_at_clock_0_is_the_token_itself_whatever_the_network(seed):
    """f(x, t) = x − t·v(x, t): the boundary condition of a consistency function holds by construction."""
    x_BLX, clock_BL = tokens(seed, clean=range(5))
    assert torch.equal(gaussian.step(x_BLX, torch.randn_like(x_BLX), clock_BL, torch.zeros_like(clock_BL)), x_BLX)


@given(seed=seeds, steps=st.integers(1, 3), stride=st.integers(1, 12))
@settings(max_examples=20)
def test_along_straight_trajectories_the_target_is_their_velocity(seed, steps, stride):
    x_BLX, clock_BL = tokens(seed)
    straight_BLX = torch.randn_like(x_BLX)
    target_BLX = Consistency(steps, 10, stride).target(x_BLX, clock_BL, lambda x, t: straight_BLX, lambda x, t: straight_BLX)
    torch.testing.assert_close(target_BLX, straight_BLX)


@pytest.mark.parametrize("consistency", [Consistency(1, 4000), Consistency(2, 4000), Consistency(1, 4000, 40)], ids=str)
def test_a_network_that_jumps_exactly_is_left_as_it_is(consistency):
    """The fixed point: on a trajectory of the teacher all estimates agree, up to the local error of its Euler steps."""
    flow, (x_BLX, clock_BL) = Normal(), tokens(0)
    own = flow.jump(consistency)
    target_BLX = consistency.target(x_BLX, clock_BL, own, flow.velocity)
    torch.testing.assert_close(target_BLX, own(x_BLX, clock_BL), atol=2e-3, rtol=0)
    assert not torch.allclose(flow.velocity(x_BLX, clock_BL), own(x_BLX, clock_BL), atol=0.05)


@given(seed=seeds, steps=st.integers(1, 3))
@settings(max_examples=20)
def test_the_whole_way_is_the_teachers_own_solution(seed, steps):
    """One step along the target ends where the teacher's Euler steps of a tenth end, the last of which is shorter."""
    flow, (x_BLX, clock_BL) = Normal(), tokens(seed)
    consistency = Consistency(steps, 10)
    end_BL = consistency.end(clock_BL)
    target_BLX = consistency.target(x_BLX, clock_BL, None, flow.velocity, whole=True)
    at_BLX, now_BL = x_BLX, clock_BL
    while bool((now_BL > end_BL).any()):
        next_BL = torch.maximum(now_BL - 0.1, end_BL)
        at_BLX, now_BL = gaussian.step(at_BLX, flow.velocity(at_BLX, now_BL), now_BL, next_BL), next_BL
    torch.testing.assert_close(gaussian.step(x_BLX, target_BLX, clock_BL, end_BL), at_BLX)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, 10])
def test_what_is_learned_reaches_the_teachers_chunk_in_so_many_steps(steps, stride):
    """With velocity a·x ten Euler steps leave (1 − a/10)¹⁰·x; a network c(t)·x that learned its targets needs ``steps``."""
    rate, consistency, learned = 0.9, Consistency(steps, 10, stride), {}

    def own(x_BLX, clock_BL):
        return torch.tensor([learned.get(round(10 * float(t)), 0.0) for t in clock_BL[:, 0]])[:, None, None] * x_BLX

    one_BLX = torch.ones(1, 1, 1)
    for tenth in range(1, 11):  # each learns from lower clocks alone
        clock_BL = torch.tensor([[tenth / 10]])
        learned[tenth] = float(consistency.target(one_BLX, clock_BL, own, lambda x, t: rate * x))
    x_BLX = one_BLX
    for done in range(steps):
        now_BL, next_BL = torch.tensor([[1 - done / steps]]), torch.tensor([[1 - (done + 1) / steps]])
        x_BLX = gaussian.step(x_BLX, own(x_BLX, now_BL), now_BL, next_BL)
    assert float(x_BLX) == pytest.approx((1 - rate / 10) ** 10, rel=1e-5)


def test_every_token_walks_by_its_own_clock_and_clean_ones_stay():
    flow, (x_BLX, clock_BL) = Normal(), tokens(0, clean=(1, 3))
    seen = []
    target_BLX = Consistency(1, 10, 3).target(
        x_BLX, clock_BL, flow.velocity, lambda x, t: seen.append(x) or flow.velocity(x, t)
    )
    assert len(seen) == 3
    assert all(torch.equal(x[:, (1, 3)], x_BLX[:, (1, 3)]) for x in seen)
    alone_BLX = Consistency(1, 10, 3).target(x_BLX[:, :1], clock_BL[:, :1], flow.velocity, flow.velocity)
    torch.testing.assert_close(target_BLX[:, :1], alone_BLX)
    assert target_BLX.isfinite().all()


def test_as_many_steps_as_the_teacher_takes_are_refused():
    with pytest.raises(ConfigError, match=r"consistency\.steps must be fewer than the teacher's, got 10 and teacher_steps 10"):
        Consistency(10)
