import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.toyset import SPEC
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.mixture import CYCLE, Mixture, Order
from vlaflow.data.windows import Windows
from vlaflow.errors import ConfigError, SpecError

orders = st.builds(Order, st.integers(1, 40), st.integers(1, 50), st.integers(0, 9))


@given(order=orders)
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(order):
    """Batches laid end to end and cut into epochs: each epoch has every sample once, so nothing is dropped or repeated."""
    steps = -(-3 * order.count // order.batch_size)
    drawn = np.concatenate([order.indices(step) for step in range(steps)])
    assert len(drawn) == steps * order.batch_size
    for epoch in range(3):
        assert sorted(drawn[epoch * order.count : (epoch + 1) * order.count]) == list(range(order.count))


@given(order=orders, step=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_order_is_a_function_of_the_step(order, step):
    """Asked out of the blue, after other steps, or of an equal order: the same answer."""
    first = order.indices(step)
    order.indices(step + 7)
    assert np.array_equal(first, Order(order.count, order.batch_size, order.seed).indices(step))


def test_order_is_the_same_in_another_process():
    """A resumed run is another process."""
    code = "from vlaflow.data.mixture import Order; print(Order(100, 8, 3).indices(20).tolist())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer.strip() == str(Order(100, 8, 3).indices(20).tolist())


def test_epochs_and_seeds_differ():
    order = Order(50, 50, 0)
    assert [order.epoch(step) for step in (0, 1, 2)] == [0.0, 1.0, 2.0]
    assert not np.array_equal(order.indices(0), order.indices(1))
    assert not np.array_equal(order.indices(0), Order(50, 50, 1).indices(0))


@pytest.mark.parametrize("bad", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_order_refuses_nonsense(bad):
    with pytest.raises(ConfigError, match="An order needs"):
        Order(*bad)


@pytest.fixture(scope="module")
def parts(pristine, tmp_path_factory):
    """Two data sets that mean the same: the first three episodes and the last two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLAFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        dataset = Dataset.open(pristine)
        cache = FrameCache.open(dataset, 16)
        code_NK = np.arange(2 * len(dataset)).reshape(-1, 2)
        yield {
            "a": Windows(dataset, cache, 4, (0, 1, 2), code_NK=code_NK),
            "b": Windows(dataset, cache, 4, (3, 4), code_NK=code_NK),
        }


def drawn(mixture, steps):
    both = [mixture.indices(step) for step in range(steps)]
    return np.concatenate([b[0] for b in both]), np.concatenate([b[1] for b in both])


def test_mixture_gives_each_part_its_share_exactly(parts):
    mixture = Mixture(parts, {"a": 3.0, "b": 1.0}, 50, 0)
    part, _ = drawn(mixture, 3 * CYCLE // 50)
    for cycle in range(3):
        assert np.bincount(part[cycle * CYCLE : (cycle + 1) * CYCLE]).tolist() == [750, 250]


def test_each_part_of_a_mixture_walks_whole_epochs(parts):
    part, index = drawn(Mixture(parts, {"a": 0.3, "b": 0.7}, 32, 5), 100)
    for number, windows in enumerate(parts.values()):
        own = index[part == number]
        for epoch in range(len(own) // len(windows)):
            assert sorted(own[epoch * len(windows) : (epoch + 1) * len(windows)]) == list(range(len(windows)))


def test_mixture_is_a_function_of_the_step(parts):
    mixture, again = (Mixture(parts, {"a": 1, "b": 2}, 24, 1) for _ in range(2))
    walked = [mixture.indices(step) for step in range(60)]
    for step in (59, 0, 41):
        assert np.array_equal(walked[step], again.indices(step))
    assert not np.array_equal(walked[0], walked[1])


def test_latent_action_codes_are_given_for_all_parts_or_for_none(parts):
    bare = Windows(parts["b"].dataset, parts["b"].cache, 4, (3, 4))
    with pytest.raises(SpecError, match="Data set 'c' has no latent action codes"):
        Mixture({"a": parts["a"], "c": bare}, {"a": 1, "c": 1}, 4, 0)
    assert Mixture({"c": bare}, {"c": 1}, 4, 0).batch(0).code_BK is None


def test_members_of_a_mixed_batch_are_those_of_indices(parts):
    mixture = Mixture(parts, {"a": 1, "b": 1}, 16, 0)
    batch, (part, index) = mixture.batch(3), mixture.indices(3)
    assert set(part) == {0, 1}
    for place in range(16):
        one = parts["ab"[part[place]]].batch(index[place : place + 1])
        assert torch.equal(batch.action_BLD[place], one.action_BLD[0])
        assert torch.equal(batch.valid_BL[place], one.valid_BL[0])
        assert torch.equal(batch.code_BK[place], one.code_BK[0])
        assert torch.equal(batch.observation.state_BS[place], one.observation.state_BS[0])
        assert torch.equal(batch.observation.images["corner"][place], one.observation.images["corner"][0])
        assert batch.observation.instructions[place] == one.observation.instructions[0]
        assert (batch.episode_B[place], batch.frame_B[place]) == (one.episode_B[0], one.frame_B[0])


@pytest.mark.parametrize("weights", [[1e-9, 1.0], [1.0, 1.0, 1.0], [0.2, 0.3, 0.5], [1e-9] * 7 + [1.0]])
def test_shares_fill_the_cycle_and_forget_nobody(parts, weights):
    names = [str(i) for i in range(len(weights))]
    mixture = Mixture(dict.fromkeys(names, parts["a"]), dict(zip(names, weights, strict=True)), 8, 0)
    assert mixture.shares.sum() == CYCLE
    assert mixture.shares.min() >= 1
    wanted = np.array(weights) / sum(weights) * CYCLE
    assert np.abs(mixture.shares - wanted).max() <= len(weights)


def other(windows, **changes):
    """The same windows with something about them changed."""
    changed = object.__new__(Windows)
    changed.__dict__.update(windows.__dict__ | changes)
    return changed


def test_parts_that_mean_something_else_are_refused(parts):
    flipped = replace(SPEC.dimensions[1], positive="right")
    spec = replace(SPEC, dimensions=(SPEC.dimensions[0], flipped, SPEC.dimensions[2]), chunk_size=4)
    with pytest.raises(SpecError, match=r"data set 'a' and data set 'c'.*positive of action dimension 'dy'"):
        Mixture({"a": parts["a"], "c": other(parts["b"], action_spec=spec)}, {"a": 1, "c": 1}, 8, 0)


def test_parts_of_another_chunk_size_or_image_size_or_view_are_refused(parts, monkeypatch, tmp_path):
    monkeypatch.setenv("VLAFLOW_CACHE", str(tmp_path))
    a, b = parts.values()
    dataset = b.dataset
    cases = {
        "chunk_size is 4 in the first and 5": Windows(dataset, b.cache, 5),
        "'image' is 16x16 in data set 'a' and 24x24 in 'c'": Windows(dataset, FrameCache.open(dataset, 24), 4),
        "View 'corner' is missing in data set 'c'": Windows(dataset, FrameCache.open(dataset, 16, ["image"]), 4),
        "'c' .* has no action spec": other(b, action_spec=None),
    }
    for sentence, windows in cases.items():
        with pytest.raises(SpecError, match=sentence):
            Mixture({"a": a, "c": windows}, {"a": 1, "c": 1}, 8, 0)


@pytest.mark.parametrize("weights", [{"a": 1}, {"a": 1, "b": 0}, {"a": 1, "b": -1}, {"a": 1, "b": float("nan")}])
def test_weights_that_do_not_fit_are_refused(parts, weights):
    with pytest.raises(ConfigError, match="eight"):
        Mixture(parts, weights, 8, 0)
