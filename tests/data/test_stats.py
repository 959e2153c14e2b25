import json

import numpy as np
import pytest

from tests.data.toyset import LENGTHS
from vlaflow.config import from_json, to_json
from vlaflow.data.lerobot import Dataset
from vlaflow.data.stats import FeatureStats, compute
from vlaflow.errors import DataError


def test_statistics_are_those_of_the_chosen_episodes(pristine):
    """Compared with numpy on the rows of episodes 1 and 3 alone, so a validation episode cannot leak in."""
    dataset = Dataset.open(pristine)
    rows = np.concatenate([dataset.columns().action[dataset.episode_slice(i)] for i in (1, 3)]).astype(np.float64)
    stats = compute(dataset, [1, 3])["action"]
    assert stats.count == LENGTHS[1] + LENGTHS[3]
    assert np.allclose(stats.mean, rows.mean(0))
    assert np.allclose(stats.std, rows.std(0))
    assert np.array_equal(stats.min, rows.min(0))
    assert np.array_equal(stats.max, rows.max(0))
    for name, q in (("q01", 1), ("q10", 10), ("q50", 50), ("q90", 90), ("q99", 99)):
        assert np.allclose(getattr(stats, name), np.percentile(rows, q, axis=0)), name


def test_all_episodes_are_the_default(pristine):
    dataset = Dataset.open(pristine)
    stats = compute(dataset)
    assert stats == compute(dataset, range(5))
    assert (stats["state"].dim, stats["action"].dim, stats["state"].count) == (2, 3, sum(LENGTHS))


def test_statistics_agree_with_those_the_writer_left_for_lerobot(pristine):
    theirs = json.loads((pristine / "meta/stats.json").read_text())["observation.state"]
    ours = compute(Dataset.open(pristine))["state"]
    assert theirs["count"] == [ours.count]
    for name in ("min", "max", "mean", "std", "q01", "q50", "q99"):
        assert theirs[name] == list(getattr(ours, name)), name


def test_json_round_trip_is_exact(pristine):
    stats = compute(Dataset.open(pristine))["action"]
    assert from_json(FeatureStats, json.loads(json.dumps(to_json(stats))), "test") == stats


def test_no_rows_have_no_statistics(pristine):
    with pytest.raises(DataError, match="at least one row"):
        compute(Dataset.open(pristine), [])
