import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaflow.config import from_json, to_json
from vlaflow.data.stats import FeatureStats
from vlaflow.data.transforms import MODES, Normalizer, RandomShift
from vlaflow.errors import ConfigError, SpecError

sizes = st.floats(1e-3, 1e3)


@given(seed=st.integers(0, 999), size=sizes, offset=st.floats(-10, 10), mode=st.sampled_from(MODES))
@settings(max_examples=60)
def test_inverse_undoes_forward(seed, size, offset, mode):
    """x → y → x, to the resolution of float32 at the largest number that takes part (8 units in the last place)."""
    values = (np.random.default_rng(seed).normal(size=(50, 3)) + offset) * size
    normalizer = Normalizer.from_stats(FeatureStats.of(values), mode)
    x = torch.tensor(values, dtype=torch.float32)
    back = normalizer.inverse(normalizer.forward(x))
    assert (back - x).abs().max() <= 8 * np.finfo(np.float32).eps * np.abs(values).max()


@given(constant=st.floats(-1e3, 1e3, width=32), mode=st.sampled_from(MODES[1:]), y=st.floats(-5, 5))
@settings(max_examples=60)
def test_constant_dimension_maps_to_zero_and_comes_back_exactly(constant, mode, y):
    """Whatever a network answers there, the robot gets the constant; whatever a sensor shows, the network sees 0."""
    values = np.full((20, 2), constant)
    values[:, 1] = np.arange(20)
    normalizer = Normalizer.from_stats(FeatureStats.of(values), mode)
    assert normalizer.forward(torch.tensor([constant + y, 3.0]))[0] == 0
    assert normalizer.inverse(torch.tensor([y, 0.0]))[0] == torch.tensor(constant)


def test_mean_std_gives_mean_0_and_deviation_1():
    values = np.random.default_rng(0).normal(5, 3, (1000, 2))
    y = Normalizer.from_stats(FeatureStats.of(values), "mean_std").forward(torch.tensor(values))
    assert torch.allclose(y.mean(0), torch.zeros(2, dtype=y.dtype), atol=1e-9)
    assert torch.allclose(y.std(0, correction=0), torch.ones(2, dtype=y.dtype), atol=1e-9)


def test_min_max_fills_minus_one_to_one():
    values = np.random.default_rng(0).normal(5, 3, (1000, 2))
    y = Normalizer.from_stats(FeatureStats.of(values), "min_max").forward(torch.tensor(values))
    assert torch.allclose(y.amin(0), -torch.ones(2, dtype=y.dtype))
    assert torch.allclose(y.amax(0), torch.ones(2, dtype=y.dtype))


def test_quantile_puts_98_percent_inside_and_does_not_clip():
    values = np.random.default_rng(0).normal(size=(10_000, 1))
    y = Normalizer.from_stats(FeatureStats.of(values), "quantile").forward(torch.tensor(values))
    assert 0.979 < (y.abs() <= 1).double().mean() < 0.981
    assert y.max() > 1.3  # the largest of 10 000 normals is near 3.9, the quantile near 2.3


def test_rare_value_survives_quantiles():
    """A gripper that closes in 0.5 % of the frames has equal quantiles; it must not be taken for a constant."""
    values = np.full((1000, 1), -1.0)
    values[:5] = 1.0
    stats = FeatureStats.of(values)
    assert stats.q01 == stats.q99
    normalizer = Normalizer.from_stats(stats, "quantile")
    assert normalizer.forward(torch.tensor([[-1.0], [1.0]])).tolist() == [[-1.0], [1.0]]


def test_identity_changes_nothing_even_where_constant():
    normalizer = Normalizer.from_stats(FeatureStats.of(np.full((4, 2), 7.0)), "identity")
    x = torch.tensor([[1.0, -2.0]])
    assert torch.equal(normalizer.forward(x), x)
    assert torch.equal(normalizer.inverse(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_type_and_shape_are_kept(dtype):
    normalizer = Normalizer.from_stats(FeatureStats.of(np.random.default_rng(0).normal(size=(9, 3))), "mean_std")
    y = normalizer.forward(torch.zeros(2, 5, 3, dtype=dtype))
    assert (y.shape, y.dtype) == ((2, 5, 3), dtype)
    assert normalizer.inverse(y).dtype == dtype


def test_json_round_trip_is_exact():
    normalizer = Normalizer.from_stats(FeatureStats.of(np.random.default_rng(0).normal(size=(9, 3))), "quantile")
    assert from_json(Normalizer, json.loads(json.dumps(to_json(normalizer))), "test") == normalizer


def test_wrong_use_is_refused():
    stats = FeatureStats.of(np.random.default_rng(0).normal(size=(9, 3)))
    with pytest.raises(ConfigError, match="did you mean 'quantile'"):
        Normalizer.from_stats(stats, "quantiles")
    with pytest.raises(SpecError, match=r"for 3 dimensions, got a tensor of shape \(2, 4\)"):
        Normalizer.from_stats(stats, "mean_std").forward(torch.zeros(2, 4))
    with pytest.raises(ConfigError, match="as many shifts as scales"):
        replace(Normalizer("min_max", (0.0,), (1.0,)), shift=(0.0, 1.0))


def test_clipping_limits_what_is_normalised_and_keeps_the_rest():
    """Within the limit nothing changes, beyond it the bound is learned, and kept dimensions are the robot's own numbers."""
    plain = Normalizer("quantile", (1.0, 0.0, 5.0), (2.0, 1.0, 0.0))
    limited = plain.limited(1.5, kept=[1])
    x_BD = torch.tensor([[3.0, -7.0, 5.0], [9.0, 2.0, 8.0], [-9.0, 0.5, 5.0]])
    assert limited.forward(x_BD).tolist() == [[1.0, -7.0, 0.0], [1.5, 2.0, 0.0], [-1.5, 0.5, 0.0]]
    assert torch.equal(limited.inverse(limited.forward(x_BD))[:, 1], x_BD[:, 1])
    assert plain.limited(None) == plain
    with pytest.raises(ConfigError, match="positive size, got 0"):
        plain.limited(0.0)


def images(batch=8, height=12, width=10):
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_random_shift_is_a_crop_of_the_padded_image():
    """Reference: pad by repeating the border, then every sample must equal one of the (2 pad + 1)² crops."""
    pad, x = 2, images()
    y = RandomShift(pad)(x, torch.Generator().manual_seed(1))
    padded = np.pad(x.numpy(), ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    found = set()
    for b in range(len(x)):
        crops = {(i, j): padded[b, i : i + 12, j : j + 10] for i in range(5) for j in range(5)}
        matching = [place for place, crop in crops.items() if np.array_equal(crop, y[b].numpy())]
        assert len(matching) == 1
        found.add(matching[0])
    assert len(found) > 3  # samples move independently


def test_random_shift_reaches_every_place_and_no_further():
    x = images(batch=1).expand(600, -1, -1, -1)
    y = RandomShift(1)(x, torch.Generator().manual_seed(0))
    assert len({t.numpy().tobytes() for t in y}) == 9


def test_random_shift_draws_only_from_its_generator():
    before = torch.get_rng_state()
    one, two = (RandomShift(3)(images(), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one, RandomShift(3)(images(), torch.Generator().manual_seed(6)))


def test_random_shift_by_nothing_changes_nothing():
    x = images()
    assert torch.equal(RandomShift(0)(x, torch.Generator()), x)
    with pytest.raises(ConfigError, match="at least 0 pixels"):
        RandomShift(-1)
