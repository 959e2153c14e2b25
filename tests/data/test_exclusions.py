"""How much the rules for pauses and interventions leave out of the loss."""

import numpy as np
import pytest

from tests.data.test_executed import ABRUPT, write
from tests.data.toyset import SPEC, edit_table
from vlaflow.data.check import check
from vlaflow.data.exclusions import exclusions
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.quality import PauseRule
from vlaflow.data.windows import Windows

COARSE = PauseRule(threshold=0.8, minimum_s=1 / SPEC.rate_hz)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLAFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        dataset = Dataset.open(write(tmp_path_factory.mktemp("executed") / "toy"))
        yield dataset, FrameCache.open(dataset, 16)


@pytest.mark.parametrize("chunk_size", [1, 4, 40])
def test_shares_are_those_of_the_batches(written, chunk_size):
    """Counted in one pass over the rows, they equal what is missing from every chunk that training would see."""
    dataset, cache = written
    episodes = (0, 2, 3)

    def valid(pause_rule, intervention_rule):
        windows = Windows(dataset, cache, chunk_size, episodes, pause_rule, intervention_rule=intervention_rule)
        return int(windows.batch(np.arange(len(windows))).valid_BL.sum())

    whole = valid(None, None)
    found = exclusions(dataset, episodes, chunk_size, COARSE, ABRUPT)
    assert found.paused == pytest.approx(1 - valid(COARSE, None) / whole)
    assert found.intervened == pytest.approx(1 - valid(None, ABRUPT) / whole)
    assert found.total == pytest.approx(1 - valid(COARSE, ABRUPT) / whole)
    assert 0 < found.paused < 1
    assert found.total >= max(found.paused, found.intervened)


def test_a_rule_that_cannot_apply_has_no_share(written, dataset):
    assert exclusions(written[0], (0,), 4, None, None).shares == ""
    found = exclusions(dataset, (0,), 4, COARSE, ABRUPT)  # keeps no executed actions
    assert found.intervened is None
    assert found.shares == f"{found.paused:.1%} in pauses"


def test_check_says_how_much_the_rule_leaves_out_and_when_training_is_refused(copy):
    """Of the last two episodes everything but the first step stands still, then of all."""
    path = copy / "data/chunk-000/file-000.parquet"
    edit_table(path, "action", lambda rows: rows[:36] + [[0.0, 0.0, 1.0]] * 18)
    some = [r for r in check(Dataset.open(copy)).remarks if "pauses" in r]
    assert len(some) == 1
    assert some[0].startswith("29.6% of the frames")  # 16 of 54
    assert "refuse" not in some[0]
    edit_table(path, "action", lambda rows: [[0.0, 0.0, 1.0]] * len(rows))
    every = [r for r in check(Dataset.open(copy)).remarks if "pauses" in r]
    assert "refuse to train while that is more than max_excluded" in every[0]
