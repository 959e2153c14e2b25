"""Grids and solvers: orders of error that are known, and what is written reads back."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlaflow.compute.spelling import read_sampling
from vlaflow.errors import ConfigError
from vlaflow.flows import gaussian
from vlaflow.flows.categorical import pick, tempered
from vlaflow.flows.sampling import Sampling

GRIDS = st.lists(st.floats(1e-6, 0.999999), max_size=4, unique=True).map(
    lambda clocks: (1.0, *sorted(clocks, reverse=True), 0.0)
)
SAMPLINGS = st.builds(
    Sampling,
    steps=st.integers(1, 40),
    noise_scale=st.sampled_from([0.0, 0.25, 1e-5, 1 / 3, 1.0]),
    grid=st.none() | GRIDS,
    solver=st.sampled_from(["euler", "midpoint", "heun"]),
    temperature=st.sampled_from([None, 0.0, 0.7, 2 / 3]),
)


def solve(sampling, velocity, x_BLD):
    """Integrate from clock 1 to 0, counting evaluations."""
    calls, ones_BL = [], torch.ones(x_BLD.shape[:2], dtype=x_BLD.dtype)

    def counted(now_BLD, clock_BL):
        calls.append(clock_BL)
        return velocity(now_BLD, clock_BL[..., None])

    for done in range(sampling.steps):
        now_BL, next_BL = sampling.clock(done) * ones_BL, sampling.clock(done + 1) * ones_BL
        x_BLD = gaussian.solver_step(sampling.solver, x_BLD, counted, now_BL, next_BL, last=done + 1 == sampling.steps)
    return x_BLD, calls


@given(sampling=SAMPLINGS)
def test_what_is_written_reads_back(sampling):
    assert read_sampling(str(sampling), 10, "x") == sampling


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Sampling(7)),
        ("2", Sampling(2)),
        ("@0", Sampling(7, noise_scale=0)),
        ("2@0.5", Sampling(2, noise_scale=0.5)),
        ("1-0.3-0", Sampling(grid=(1.0, 0.3, 0.0))),
        ("1-.5-0@.5,heun", Sampling(2, 0.5, (1.0, 0.5, 0.0), "heun")),
        ("16,temperature=0", Sampling(16, temperature=0.0)),
        ("16,expected", Sampling(16, expected=True)),
        ("2,temperature=0.5,expected", Sampling(2, temperature=0.5, expected=True)),
    ],
)
def test_settings_as_people_type_them(text, expected):
    assert read_sampling(text, 7, "x") == expected


@pytest.mark.parametrize(
    "text", ["x", "2@", "2@2", "2@1.2.3", "0.3-0", "1-0.3", "1-0.3-0.5-0", "1-0.5-0.5-0", "0", "2,rk4", "2@-1", "5,depth=2"]
)
def test_malformed_settings_are_refused_in_one_sentence(text):
    with pytest.raises(ConfigError) as refusal:
        read_sampling(text, 10, f"dense:{text}")
    assert "\n" not in str(refusal.value)


def test_a_stated_grid_brings_its_own_number_of_steps():
    assert Sampling(10, grid=(1.0, 0.3, 0.0)).steps == 2


@given(grid=GRIDS, seed=st.integers(0, 2**31))
def test_euler_on_any_grid_is_exact_along_a_straight_path(grid, seed):
    """The velocity is constant there, so the sum of the strides, 1, is all that counts; rounding is left (float64)."""
    noise, action = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found, calls = solve(Sampling(grid=grid), lambda x, clock: gaussian.velocity_target(action, noise), noise)
    torch.testing.assert_close(found, action, atol=1e-12, rtol=0)
    assert len(calls) == len(grid) - 1


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_solver(solver, order):
    """dx/dt = x + t through x(1) = 1 ends at x(0) = 3/e − 1; halving the stride divides the error by 2^order."""
    exact = 3 / math.e - 1
    start = torch.ones(1, 1, 1, dtype=torch.float64)
    errors = [
        abs(float(solve(Sampling(steps, solver=solver), lambda x, clock: x + clock, start)[0]) - exact)
        for steps in (64, 128, 256)
    ]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@given(sampling=SAMPLINGS)
def test_evaluations_are_counted_and_none_is_at_clock_zero(sampling):
    _, calls = solve(sampling, lambda x, clock: x, torch.ones(1, 2, 1))
    assert len(calls) == sampling.evaluations
    assert all(bool((clock_BL > 0).all()) for clock_BL in calls)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
def test_no_solver_moves_a_token_whose_clock_stands(solver):
    x_BLD, clock_BL = torch.randn(1, 2, 3), torch.tensor([[0.0, 1.0]])
    moved = gaussian.solver_step(solver, x_BLD, lambda x, clock: torch.ones_like(x), clock_BL, clock_BL / 2, last=False)
    assert torch.equal(moved[:, 0], x_BLD[:, 0])
    assert not torch.equal(moved[:, 1], x_BLD[:, 1])


def test_noise_scales_and_the_generator_ends_where_it_would():
    whole, half, none = (torch.Generator().manual_seed(3) for _ in range(3))
    made = [gaussian.standard_normal([g], (4, 2), scale) for g, scale in ((whole, 1.0), (half, 0.5), (none, 0.0))]
    assert torch.equal(made[0], torch.randn(4, 2, generator=torch.Generator().manual_seed(3))[None])
    assert torch.equal(made[1], 0.5 * made[0])
    assert not made[2].view(torch.int32).any()  # no sign of the noise is left
    assert torch.equal(whole.get_state(), none.get_state())


def test_temperature_zero_is_the_most_probable_token_whatever_the_draw():
    logits_BSV = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0))
    for uniform in (0.0, 0.5, 1 - 2**-24):
        assert torch.equal(pick(tempered(logits_BSV, 0), torch.full((2, 50), uniform)), logits_BSV.argmax(-1))
    assert torch.equal(tempered(logits_BSV, 1), logits_BSV.softmax(-1))
    assert float(tempered(logits_BSV, 0.1).amax(-1).mean()) > float(tempered(logits_BSV, 1).amax(-1).mean())
