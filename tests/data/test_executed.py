"""Data sets that keep what the robot was given apart from what is to be learned."""

import re

import numpy as np
import pytest
import torch

from tests.data.toyset import LENGTHS, TASKS, edit_table, episode, writer
from vlaflow.data.batch import Executed
from vlaflow.data.common import CommonShape
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import EXECUTED_KEY, Dataset
from vlaflow.data.mixture import Mixed
from vlaflow.data.quality import INTERVENTIONS, InterventionRule, interventions
from vlaflow.data.windows import Windows
from vlaflow.errors import ConfigError, DataError


def executed_of(number):
    """Mostly what was noted, with a few steps far from it and a little noise everywhere."""
    action, rng = episode(number)[2], np.random.default_rng([number, 1])
    other = action + rng.uniform(-0.1, 0.1, action.shape).astype(np.float32)
    far = rng.random(len(action)) < 0.2
    other[far, 0] += 0.9
    return other, far


ABRUPT = InterventionRule(0.5, 1)


def write(root, change=lambda values: values):
    with writer(root) as out:
        for number, task in enumerate(TASKS):
            out.add(*episode(number), task, extra={EXECUTED_KEY: change(executed_of(number)[0])})
    return root


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLAFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        dataset = Dataset.open(write(tmp_path_factory.mktemp("executed") / "toy"))
        yield dataset, FrameCache.open(dataset, 16)


def test_both_are_read(written):
    columns = written[0].columns()
    assert np.array_equal(columns.action, np.concatenate([episode(n)[2] for n in range(len(TASKS))]))
    assert np.array_equal(columns.executed, np.concatenate([executed_of(n)[0] for n in range(len(TASKS))]))


def test_where_the_column_is_missing_the_actions_were_executed(dataset):
    columns = dataset.columns()
    assert dataset.executed_key is None
    assert np.array_equal(columns.executed, columns.action)


def test_a_column_of_another_width_is_refused(tmp_path):
    root = write(tmp_path / "wide", lambda values: np.tile(values, 2))
    with pytest.raises(DataError, match=re.escape(f"'executed_action' of {root} has 6 numbers, 'action' has 3.")):
        Dataset.open(root)


def test_a_value_that_is_not_finite_is_refused(tmp_path):
    root = write(tmp_path / "nan")
    edit_table(
        root / "data/chunk-000/file-000.parquet",
        EXECUTED_KEY,
        lambda rows: [row if i != 5 else [0.0, np.nan, 0.0] for i, row in enumerate(rows)],
    )
    with pytest.raises(DataError, match=r"Episode 0 of .* holds nan in 'executed_action' at frame 5"):
        Dataset.open(root).columns()


def test_video_alone_takes_no_interest_in_the_column(tmp_path):
    root = write(tmp_path / "wide", lambda values: np.tile(values, 2))
    assert Dataset.open(root, video=True).executed_key is None


def marked(executed, rule=INTERVENTIONS, half_span=(1.0, 1.0, 0.0)):
    noted = np.zeros((12, 3), np.float32)
    return np.flatnonzero(interventions(noted, noted + np.array(executed, np.float32), np.array(half_span), rule)).tolist()


def row(value, *places):
    rows = np.zeros((12, 3))
    rows[list(places), 1] = value
    return rows


def test_a_lasting_difference_is_an_intervention():
    """Of 0.6 half-spans from the step on around which most of five differ, and of less than the threshold never."""
    assert marked(row(0.6, *range(12))) == list(range(12))
    assert marked(row(0.9, 5, 6, 7, 8)) == [5, 6, 7, 8]
    assert marked(row(-0.9, 5, 6, 7, 8)) == [5, 6, 7, 8]
    assert marked(row(0.49, *range(12))) == []


def test_noise_averages_out_and_one_step_is_none():
    assert marked(row(1.9, 5)) == []
    assert marked(row(1.9, 5), ABRUPT) == [5]
    assert marked(row(1.4, *range(0, 12, 2)) - row(1.4, *range(1, 12, 2))) == []


def test_the_measure_is_what_the_dimension_spans():
    assert marked(row(0.6, *range(12)), half_span=(1.0, 2.0, 0.0)) == []
    rows = np.zeros((12, 3))
    rows[:, 2] = 5.0  # a dimension that never varies among the noted actions tells nothing
    assert marked(rows) == []


def test_noise_of_the_default_size_is_no_intervention_and_three_times_as_much_hardly():
    noise = np.random.default_rng(0).standard_normal((100_000, 3))
    share = [interventions(0 * noise, scale * noise, np.ones(3), INTERVENTIONS).mean() for scale in (0.1, 0.3)]
    assert share[0] == 0
    assert share[1] < 0.002


def test_in_a_dimension_that_hardly_moves_noise_is_none_either():
    """The threshold is the larger of a share of the range and the least difference."""
    rule = InterventionRule(0.5, 5, least=0.4)
    assert marked(row(0.3, *range(12)), rule, half_span=(1.0, 0.01, 0.0)) == []
    assert marked(row(0.45, *range(12)), rule, half_span=(1.0, 0.01, 0.0)) == list(range(12))
    assert marked(row(0.45, *range(12)), rule, half_span=(1.0, 2.0, 0.0)) == []


@pytest.mark.parametrize("wrong", [{"threshold": 0}, {"steps": 0}, {"least": -0.1}, {"least": float("nan")}])
def test_impossible_rules_are_refused(wrong):
    with pytest.raises(ConfigError, match="An intervention needs"):
        InterventionRule(**wrong)


def test_without_a_rule_everything_counts(written):
    batch = Windows(*written, 6, intervention_rule=None).batch(np.arange(20))
    assert torch.equal(batch.valid_BL, batch.executed.present_BL)
    assert not batch.executed.intervened_BL.any()


def test_actions_noted_after_an_intervention_do_not_count(written):
    """The slow and plain way, for every frame: a step counts up to the first intervention, that one included."""
    windows = Windows(*written, 6, intervention_rule=ABRUPT)
    batch = windows.batch(np.arange(len(windows)))
    sample, ended = 0, 0
    for number, length in enumerate(LENGTHS):
        far = executed_of(number)[1]
        for frame in range(length):
            counts = [frame + j < length and not far[frame : frame + j].any() for j in range(6)]
            assert batch.valid_BL[sample].tolist() == counts
            ended += sum(frame + j < length for j in range(6)) - sum(counts)
            sample += 1
    assert ended > 20


def test_what_is_given_excuses_its_interventions():
    """With the first three actions given, only an intervention after them ends what counts."""
    intervened = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    present = torch.ones(3, 7, dtype=torch.bool)
    present[1, 5:] = False
    executed = Executed(torch.zeros(3, 7, 2), intervened, present)
    assert executed.valid_after(0).int().tolist() == [[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    given_B1 = torch.tensor([[3], [0], [3]])
    assert executed.valid_after(given_B1).int().tolist() == [
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
    ]
    assert torch.equal(executed.repeat(2).valid_after(given_B1.repeat_interleave(2, 0))[::2], executed.valid_after(given_B1))


def test_a_mixture_takes_it_along(written, dataset, tmp_path, monkeypatch):
    """From one data set that keeps it and one that does not, in the order of the samples."""
    monkeypatch.setenv("VLAFLOW_CACHE", str(tmp_path / "cache"))
    parts = {"a": Windows(*written, 4, intervention_rule=ABRUPT), "b": Windows(dataset, FrameCache.open(dataset, 16), 4)}
    shape = CommonShape(2, 3, 4, tuple(written[1].views))
    mixture, first = Mixed(parts, {"a": 1.0, "b": 1.0}, shape, {"a": 0, "b": 0}), len(parts["a"])
    index_B = mixture.order(len(mixture), 24, 0).indices(0)
    batch, part_B = mixture.batch(index_B), (index_B >= first).astype(int)
    for place, (part, index) in enumerate(zip(part_B, index_B - first * part_B, strict=True)):
        alone = list(parts.values())[part].batch(np.array([index]))
        assert torch.equal(batch.executed.action_BLD[place], alone.executed.action_BLD[0])
        assert torch.equal(batch.executed.intervened_BL[place], alone.executed.intervened_BL[0])
        assert torch.equal(batch.valid_BL[place], alone.valid_BL[0])
    assert set(part_B) == {0, 1}
