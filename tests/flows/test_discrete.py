"""Discrete flows: paths, velocities and jumps against closed forms and the Kolmogorov equation."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaflow.errors import ConfigError
from vlaflow.flows import discrete, masked, metrics
from vlaflow.flows.categorical import gumbel, pick, uniforms

TABLE = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
VALUES = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0], [0.0, 0.4, 0.5, 1.1, 3.0]])
SLOTS = metrics.line_distance(VALUES, torch.tensor([1.3, 0.4]))
MEAN_ONE = {
    "euclid": metrics.embedding_distance(TABLE, 1),
    "square": metrics.embedding_distance(TABLE, 2),
    "fourth": metrics.embedding_distance(TABLE, 4),
    "bins": metrics.bin_distance(5),
    "bins and end": metrics.bin_distance(4, others=1, power=2),
}
METRICS = {**MEAN_ONE, "slot": SLOTS[1]}
every_metric = pytest.mark.parametrize("distance_VV", METRICS.values(), ids=METRICS.keys())
seeds = st.integers(0, 2**31)
schedules = st.builds(discrete.MetricSchedule, st.floats(0.5, 6), st.floats(0.5, 2))
EXACT = 1e-5  # float32 sums of five numbers


def rate_matrix(distance_VV, target, clock, schedule):
    """Generator matrix (V, V) of the metric velocity at one clock: row z holds the rates out of z."""
    size = len(distance_VV)
    token = torch.arange(size)[:, None]
    aim, when = torch.full_like(token, target), torch.full(token.shape, clock, dtype=distance_VV.dtype)
    rate_VV = discrete.metric_velocity(token, distance_VV[aim], schedule.beta(when), schedule.rate(when, when / 100))[:, 0]
    return rate_VV - torch.diag(rate_VV.sum(1))


def path(distance_VV, target, clock, schedule):
    beta = schedule.beta(torch.tensor([[clock]], dtype=distance_VV.dtype))
    return discrete.metric_path(distance_VV[torch.tensor([[target]])], beta)[0, 0]


@every_metric
@given(clock=st.floats(0.01, 1), target=st.integers(0, 4), schedule=schedules)
def test_the_metric_path_is_a_distribution_at_every_clock(distance_VV, clock, target, schedule):
    p_V = path(distance_VV, target, clock, schedule)
    assert bool((p_V >= 0).all())
    assert float(p_V.sum()) == pytest.approx(1, abs=EXACT)


@every_metric
def test_the_metric_path_leads_from_uniform_noise_to_the_target_alone(distance_VV):
    schedule = discrete.MetricSchedule()
    torch.testing.assert_close(path(distance_VV, 2, 1.0, schedule), torch.full((5,), 0.2))
    assert torch.equal(path(distance_VV, 2, 0.0, schedule), torch.eye(5)[2])
    assert float(path(distance_VV, 2, 0.02, schedule)[2]) > 0.999


def test_the_mixture_path_and_its_ends():
    target = torch.tensor([[3, 3, 3]])
    p_SV = discrete.mixture_path(target, 5, torch.tensor([[1.0, 0.5, 0.0]]))[0]
    torch.testing.assert_close(p_SV[0], torch.full((5,), 0.2))
    assert float(p_SV[1, 3]) == pytest.approx(0.6)
    assert torch.equal(p_SV[2], torch.eye(5)[3])


@every_metric
@given(clock=st.floats(0.05, 0.999), target=st.integers(0, 4), schedule=schedules)
def test_velocity_is_not_negative_and_only_moves_closer(distance_VV, clock, target, schedule):
    matrix = rate_matrix(distance_VV, target, clock, schedule)
    off = matrix - torch.diag(torch.diag(matrix))
    assert bool((off >= 0).all())
    closer = distance_VV[target][None, :] < distance_VV[target][:, None]
    assert bool((off[~closer] == 0).all())
    assert bool((matrix[target] == 0).all()), "at the target nothing moves"
    assert torch.isfinite(matrix).all()


@every_metric
@settings(max_examples=30)
@given(clock=st.floats(0.1, 0.95), target=st.integers(0, 4), schedule=schedules)
def test_velocity_satisfies_the_kolmogorov_forward_equation(distance_VV, clock, target, schedule):
    """dp/dt = pᵀ R with t = 1 − clock, the derivative by central differences in float64."""
    distance_VV, h = distance_VV.double(), 1e-5
    later, earlier = (path(distance_VV, target, clock + shift, schedule) for shift in (-h, h))
    slope_V = (later - earlier) / (2 * h)
    flow_V = path(distance_VV, target, clock, schedule) @ rate_matrix(distance_VV, target, clock, schedule)
    torch.testing.assert_close(flow_V, slope_V, atol=1e-4, rtol=1e-3)


@every_metric
@pytest.mark.parametrize("rule", ["linear", "exponential"])
def test_simulated_marginals_agree_with_the_path(distance_VV, rule):
    """Chi-square of 20 000 chains after 400 small steps, four degrees of freedom; 0.1 % of right chains exceed 18.5.

    The bound leaves as much again for the error of 400 Euler steps.
    """
    schedule, target, chains, steps = discrete.MetricSchedule(), 1, 20_000, 400
    generators = [torch.Generator().manual_seed(5)]
    token = (uniforms(generators, (chains,)) * 5).long()
    every, aim = torch.arange(5)[None], torch.full((1, 5), target)  # chains at one token share its rates
    clocks = torch.linspace(1, 0.4, steps + 1)
    for now, after in pairwise(clocks.tolist()):
        when, stride = torch.full(every.shape, now), torch.full(every.shape, now - after)
        rate_VV = discrete.metric_velocity(every, distance_VV[aim], schedule.beta(when), schedule.rate(when, stride))[0]
        draws = uniforms(generators, (2, chains)).transpose(0, 1)
        token = discrete.jump(token, rate_VV[token], stride[:, :1].expand(token.shape), draws, rule)
    expected = path(distance_VV, target, 0.4, schedule) * chains
    found = torch.bincount(token[0], minlength=5).float()
    assert float(((found - expected).square() / expected).sum()) < 37


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_rate_is_the_derivative_of_beta_and_finite_where_the_formula_is_not(alpha):
    schedule = discrete.MetricSchedule(c=2.0, alpha=alpha)
    clock, h = torch.tensor([0.3, 0.7], dtype=torch.float64), 1e-6
    slope = (schedule.beta(clock - h) - schedule.beta(clock + h)) / (2 * h)
    torch.testing.assert_close(schedule.rate(clock, torch.full_like(clock, 0.1)), slope, rtol=1e-5, atol=0)
    one, stride = torch.ones(1), torch.full((1,), 0.0625)
    expected = {0.5: float(schedule.beta(one - stride) / stride), 1.0: 2.0, 2.0: 0.0}[alpha]
    assert float(schedule.rate(one, stride)) == pytest.approx(expected, rel=1e-5)


def test_jump_probabilities_follow_their_rule():
    """40 000 tokens, standard deviation of the share 0.0025; five of them are the tolerance."""
    tokens, rate = torch.zeros(1, 40_000, dtype=torch.long), torch.zeros(1, 40_000, 3)
    rate[..., 1], rate[..., 2] = 1.0, 3.0
    stride = torch.full(tokens.shape, 0.1)
    draws = uniforms([torch.Generator().manual_seed(0)], (2, 40_000)).transpose(0, 1)
    for rule, expected in (("linear", 0.4), ("exponential", 1 - math.exp(-0.4))):
        after = discrete.jump(tokens, rate, stride, draws, rule)
        assert float((after != 0).float().mean()) == pytest.approx(expected, abs=0.0125)
        assert float((after == 2).float().sum() / (after != 0).sum()) == pytest.approx(0.75, abs=0.02)
    assert torch.equal(discrete.jump(tokens, rate, 0 * stride, draws), tokens)


@given(seed=st.integers(0, 1000))
def test_a_token_without_weight_is_never_drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(2, 30, 7, generator=generator) * (torch.rand(2, 30, 7, generator=generator) < 0.5)
    drawn = pick(weight, torch.rand(2, 30, generator=generator))
    chosen = weight.gather(-1, drawn[..., None])[..., 0]
    assert bool(((chosen > 0) | (weight.sum(-1) == 0)).all())


def test_numbers_are_drawn_where_their_generator_lives(monkeypatch):
    """The generator of a GPU cannot draw on the CPU. Here a device without values stands for the GPU."""
    gpu = type("OnGpu", (), {"device": torch.device("meta")})()
    monkeypatch.setattr(torch, "rand", lambda shape, generator, device="cpu": torch.empty(shape, device=device))
    assert uniforms([gpu, gpu], (3,), None, torch.tensor([True, False])).device == gpu.device


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_stay_inside_the_vocabulary(uniform):
    weight = torch.tensor([[[0.0, 0.3, 0.7, 0.0]]])
    assert int(pick(weight, torch.tensor([[uniform]]))) in (1, 2)
    assert torch.isfinite(gumbel(torch.tensor(uniform)))


def test_distances_have_mean_one_and_rows_that_cannot_be_told_apart_are_refused():
    for distance_VV in MEAN_ONE.values():
        assert float(distance_VV.sum()) / 20 == pytest.approx(1, rel=1e-5)
        assert bool((distance_VV.diag() == 0).all())
    with pytest.raises(ConfigError, match="same embedding"):
        metrics.embedding_distance(torch.ones(4, 3), 2)


def test_nearly_parallel_rows_are_told_apart_after_rescaling():
    """Never-trained ids (cosine 0.9975) have distances of 0.005; the path must still reach its target."""
    table = torch.ones(64, 32) + 0.05 * torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    distance_VV = metrics.embedding_distance(table, 2)
    assert float(path(distance_VV, 3, 0.1, discrete.MetricSchedule())[3]) > 0.99


@given(count=st.integers(0, 64), steps=st.integers(1, 20))
def test_masked_counts_fall_to_zero_by_the_cosine(count, steps):
    left = [int(masked.still_masked(torch.tensor([count]), done, steps)) for done in range(1, steps + 1)]
    before = [count, *left[:-1]]
    assert left[-1] == 0
    assert all(b - a >= min(1, b) for a, b in zip(left, before, strict=True)), "every step reveals one while any is masked"
    for done, a in enumerate(left[:-1], 1):
        assert a == min(math.floor(count * math.cos(math.pi * done / (2 * steps)) + 1e-12), max(count - done, 0))


def test_training_masks_follow_the_cosine_of_a_uniform():
    """The mean share is E max(cos(πr/2), 0.1), by quadrature 0.6370."""
    mask_BS = masked.training_mask(20_000, 16, torch.Generator().manual_seed(0))
    r = torch.linspace(0, 1, 100_001)
    expected = float(torch.cos(r * math.pi / 2).clamp(min=0.1).mean())
    assert float(mask_BS.float().mean()) == pytest.approx(expected, abs=0.01)


def test_the_lowest_are_exactly_as_many_as_asked():
    confidence = torch.tensor([[0.3, 0.1, float("inf"), 0.2], [1.0, 1.0, 1.0, 1.0]])
    assert masked.lowest(confidence, torch.tensor([2, 3])).tolist() == [[False, True, False, True], [True, True, True, False]]


def test_distances_are_the_same_under_autocast():
    """In bfloat16 the rows of a young table fall together, and the path that is trained is not the one that is sampled."""
    table_VW = 1 + 0.05 * torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_VV = metrics.embedding_distance(table_VW)
    assert torch.equal(under_VV, metrics.embedding_distance(table_VW))


def test_distances_on_the_line_of_a_slot_are_differences_of_values_in_units_of_its_spread():
    torch.testing.assert_close(SLOTS[0], (VALUES[0][:, None] - VALUES[0]).abs() / 1.3)
    assert float(SLOTS[1, 0, 4]) == pytest.approx(3 / 0.75, rel=1e-3), "a spread below one step counts as one step"
    squared = metrics.line_distance(VALUES, torch.tensor([1.3, 0.4]), power=2)
    torch.testing.assert_close(squared, SLOTS.square())
    with pytest.raises(ConfigError, match="at least two tokens"):
        metrics.line_distance(VALUES[:, :1], torch.ones(2))


@given(factor=st.floats(1e-3, 1e3), seed=seeds)
def test_a_slot_of_larger_values_has_the_same_distances_if_its_data_spread_as_much_more(factor, seed):
    value_SV = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(1).values
    spread_S = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    plain, scaled = (metrics.line_distance(k * value_SV, k * spread_S) for k in (1.0, factor))
    torch.testing.assert_close(plain, scaled)


def test_ids_of_equal_value_and_slots_of_one_value_still_have_a_path_to_every_id():
    distance_SVV = metrics.line_distance(torch.tensor([[0.0, 0.0, 1.0], [5.0, 5.0, 5.0]]), torch.zeros(2))
    assert bool((distance_SVV + torch.eye(3) > 0).all())
    assert bool((distance_SVV.diagonal(dim1=1, dim2=2) == 0).all())


@given(seed=seeds, count=st.integers(1, 12))
def test_the_mean_difference_is_that_of_all_pairs(seed, count):
    value_NS = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = [(value_NS[a] - value_NS[b]).abs() for a in range(count) for b in range(a)]
    expected = torch.stack(pairs).mean(0) if pairs else torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(metrics.mean_difference(value_NS), expected)


@pytest.mark.parametrize(("power", "pure"), [(1.0, 0.0), (3.0, 0.0), (1.0, 0.25), (2.0, 0.5)])
def test_training_clocks_have_the_stated_mean_and_share_of_pure_noise(power, pure):
    """The mean of k·clock^(k − 1) is k/(k + 1); 40 000 clocks, five standard deviations of their mean (at most 0.0015 each)."""
    clock_B1 = discrete.TrainingClocks(power, pure).draw(40_000, torch.Generator().manual_seed(0))
    assert 0 < float(clock_B1.min()) <= float(clock_B1.max()) <= 1
    assert float(clock_B1.mean()) == pytest.approx(pure + (1 - pure) * power / (power + 1), abs=0.0075)
    assert float((clock_B1 == 1).float().mean()) == pytest.approx(pure, abs=0.0125)


def test_clocks_by_default_are_one_uniform_number_each():
    drawn, expected = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert torch.equal(discrete.TrainingClocks().draw(5, drawn), 1 - torch.rand(5, 1, generator=expected))
    assert torch.equal(torch.rand(1, generator=drawn), torch.rand(1, generator=expected)), "and nothing else is drawn"
    with pytest.raises(ConfigError, match="power above 0"):
        discrete.TrainingClocks(power=0)
