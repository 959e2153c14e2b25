import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaflow.data.common import CommonShape, Normalizers
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.mixture import CYCLE, Mixed, MixedOrder, Order
from vlaflow.data.transforms import Normalizer
from vlaflow.data.weights import DatasetEntry, Member, Mixture, named_mixture, weights_of
from vlaflow.data.windows import Windows
from vlaflow.errors import ConfigError

orders = st.builds(Order, st.integers(1, 40), st.integers(1, 50), st.integers(0, 9))


@given(order=orders)
@settings(max_examples=60)
def test_every_epoch_is_a_permutation(order):
    """Batches laid end to end and cut into epochs: each epoch has every sample once, so nothing is dropped or repeated."""
    steps = -(-3 * order.count // order.batch_size)
    drawn = np.concatenate([order.indices(step) for step in range(steps)])
    assert len(drawn) == steps * order.batch_size
    for epoch in range(3):
        assert sorted(drawn[epoch * order.count : (epoch + 1) * order.count]) == list(range(order.count))


@given(order=orders, step=st.integers(0, 10**6))
@settings(max_examples=60)
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


COUNTS = (30, 20)


def drawn(order, steps):
    """Parts and places within them of the first steps."""
    index = np.concatenate([order.indices(step) for step in range(steps)])
    part = np.searchsorted(np.cumsum(COUNTS), index, side="right")
    return part, index - np.array((0, COUNTS[0]))[part]


def test_mixture_gives_each_part_its_share_exactly():
    part, _ = drawn(MixedOrder(COUNTS, (3.0, 1.0), 500, 0), 3 * CYCLE // 500)
    for cycle in range(3):
        assert np.bincount(part[cycle * CYCLE : (cycle + 1) * CYCLE]).tolist() == [7500, 2500]


def test_each_part_of_a_mixture_walks_whole_epochs():
    part, index = drawn(MixedOrder(COUNTS, (0.3, 0.7), 32, 5), 100)
    for number, count in enumerate(COUNTS):
        own = index[part == number]
        for epoch in range(len(own) // count):
            assert sorted(own[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_mixed_order_is_a_function_of_the_step():
    order, again = (MixedOrder(COUNTS, (1, 2), 24, 1) for _ in range(2))
    walked = [order.indices(step) for step in range(60)]
    for step in (59, 0, 41):
        assert np.array_equal(walked[step], again.indices(step))
    assert not np.array_equal(walked[0], walked[1])


@pytest.mark.parametrize("weights", [[1e-9, 1.0], [1.0, 1.0, 1.0], [0.2, 0.3, 0.5], [1e-9] * 7 + [1.0]])
def test_shares_fill_the_cycle_and_leave_no_part_out(weights):
    shares = MixedOrder([5] * len(weights), weights, 8, 0).shares
    assert shares.sum() == CYCLE
    assert shares.min() >= 1
    assert np.abs(shares - np.array(weights) / sum(weights) * CYCLE).max() <= len(weights)


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, -1), (1, float("nan"))])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ConfigError, match="eight"):
        MixedOrder(COUNTS, weights, 8, 0)


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(pristine, tmp_path_factory):
    """Two parts of a data set: with both views and chunks of four, and with one view and chunks of three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLAFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        dataset = Dataset.open(pristine)
        code_NK = np.arange(2 * len(dataset)).reshape(-1, 2)
        yield {
            "a": Windows(dataset, FrameCache.open(dataset, 16), 4, (0, 1, 2), code_NK=code_NK),
            "b": Windows(dataset, FrameCache.open(dataset, 16, ["image"]), 3, (3, 4), code_NK=code_NK),
        }


SHAPE = CommonShape(state_dim=3, action_dim=4, chunk_size=4, views=("image", "corner"))


def test_mixed_samples_are_those_of_the_parts_padded_and_masked(parts):
    mixed = Mixed(parts, {"a": 1, "b": 1}, SHAPE, {"a": 0, "b": 1})
    index = np.array([len(parts["a"]), 3, len(mixed) - 1, 0])
    batch = mixed.batch(index)
    assert list(batch.sources) == ["b", "a", "b", "a"]
    for place, (name, own, steps) in enumerate((("b", 0, 3), ("a", 3, 4), ("b", len(parts["b"]) - 1, 3), ("a", 0, 4))):
        one, seen = parts[name].batch(np.array([own])), batch.observation
        assert torch.equal(batch.action_BLD[place, :steps, :3], one.action_BLD[0])
        assert torch.equal(batch.action_BLD[place, steps:, :3], one.action_BLD[0, -1:].expand(4 - steps, 3))
        assert not batch.action_BLD[place, :, 3:].any()
        assert batch.mask_BLD[place].sum() == batch.mask_BLD[place, :steps, :3].sum() == 3 * steps
        assert torch.equal(batch.valid_BL[place, :steps], one.valid_BL[0])
        assert not batch.valid_BL[place, steps:].any()
        assert torch.equal(batch.executed.present_BL[place, :steps], one.executed.present_BL[0])
        assert torch.equal(batch.code_BK[place], one.code_BK[0])
        assert torch.equal(seen.state_BS[place], torch.nn.functional.pad(one.observation.state_BS[0], (0, 1)))
        assert seen.robot_B[place] == (name == "b")
        assert seen.shown["image"][place]
        assert seen.shown["corner"][place] == (name == "a")
        assert torch.equal(seen.images["image"][place], one.observation.images["image"][0])
        assert seen.images["corner"][place].any() == (name == "a")
        assert seen.instructions[place] == one.observation.instructions[0]
        assert (batch.episode_B[place], batch.frame_B[place]) == (one.episode_B[0], one.frame_B[0])


def test_numbers_are_normalised_by_robot_and_padding_becomes_zero():
    narrow = Normalizer("mean_std", (5.0, 6.0), (2.0, 0.0))
    wide = Normalizer("mean_std", (1.0, 2.0, 3.0), (1.0, 2.0, 4.0))
    x_BD = torch.tensor([[7.0, 6.5, 9.0], [2.0, 4.0, 7.0]])
    both = Normalizers((narrow, wide), 3)
    assert both.forward(x_BD, torch.tensor([0, 1])).tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    assert torch.equal(Normalizers((wide,), 3).forward(x_BD), wide.forward(x_BD))
    assert not both.forward(x_BD).any()


# -- weights -----------------------------------------------------------------------------------------------------------


def member(text, robot="arm", samples=1):
    return Member(DatasetEntry.parse(text), robot, samples)


def test_entries_are_read_as_they_are_written(tmp_path):
    assert DatasetEntry.parse("x/droid:0.7") == DatasetEntry("x/droid", "droid", 0.7)
    assert DatasetEntry.parse("mine=x/droid") == DatasetEntry("x/droid", "mine", None)
    assert DatasetEntry.parse("hf://USER/NAME") == DatasetEntry("hf://USER/NAME", "NAME", None)
    assert DatasetEntry.parse("hf://USER/NAME@v3.0:2") == DatasetEntry("hf://USER/NAME@v3.0", "NAME", 2.0)
    assert DatasetEntry.parse("mine=USER/NAME@v3.0:2") == DatasetEntry("USER/NAME@v3.0", "mine", 2.0)
    odd = tmp_path / "a=b:3"
    odd.mkdir()
    assert DatasetEntry.parse(str(odd)) == DatasetEntry(str(odd), "a=b:3", None)
    for wrong in ("x/droid:0", "x/droid:much", "mine="):
        with pytest.raises(ConfigError, match="--dataset"):
            DatasetEntry.parse(wrong)


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ("frames", [0.1, 0.2, 0.3, 0.4]),
        ("datasets", [1 / 2 * 1 / 6, 1 / 2 * 2 / 6, 1 / 2 * 3 / 6, 1 / 2]),
        ("robots", [1 / 4 * 1 / 3, 1 / 4 * 2 / 3, 1 / 4, 1 / 2]),
    ],
)
def test_rules_divide_samples_among_data_sets_robots_and_frames(mixture, expected):
    """A data set "big" with two robots, of which one has two parts, and a data set "small"."""
    members = [member("big=a", "one", 10), member("big=b", "one", 20), member("big=c", "two", 30), member("small=d", "one", 40)]
    assert weights_of(members, named_mixture(mixture)) == pytest.approx(expected)


def test_stated_weights_go_before_rules_and_names_have_weights_of_their_own():
    assert weights_of([member("a:3"), member("b:1", samples=99)], Mixture("datasets")) == [0.75, 0.25]
    oxe = weights_of([member("bridge=x"), member("toto=y"), member("toto=z", samples=3)], named_mixture("asyncvla-oxe"))
    assert oxe == pytest.approx([24.14 / 34.48, 10.34 / 34.48 / 4, 10.34 / 34.48 * 3 / 4])
    assert sum(named_mixture("asyncvla-oxe").weights.values()) == pytest.approx(99.98)
    with pytest.raises(ConfigError, match=r"b has no weight.*--dataset b:WEIGHT"):
        weights_of([member("a:3"), member("b")], Mixture())
    with pytest.raises(ConfigError, match=r"no weight for a data set 'bridge2'.*'bridge'.*NAME=DIR"):
        weights_of([member("bridge2=x")], named_mixture("asyncvla-oxe"))
    with pytest.raises(ConfigError, match="no mixture 'frame'"):
        named_mixture("frame")
