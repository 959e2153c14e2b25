"""Outputs of the edit tools of lerobot 0.6.1 are read: rows, tasks and frames are those of the edited episodes.

``tests/fixtures/lerobot_edits`` was written by LeRobot's ``delete_episodes``, ``split_dataset``, ``merge_datasets``,
``remove_feature``, ``modify_tasks``, ``add_features`` (a reward) and ``convert_image_to_video_dataset`` from two data sets of
``recorded`` pictures and numbers.
"""

from pathlib import Path

import numpy as np
import pytest

from vlaflow.data.check import check
from vlaflow.data.edit import repair
from vlaflow.data.lerobot import Dataset

EDITS = Path(__file__).parents[1] / "fixtures/lerobot_edits"
FIRST, SECOND = ("push", "open", "push", "close"), ("open", "lift")

CASES = {
    "deleted": [(0, 0), (0, 2), (0, 3)],
    "split": [(0, 1), (0, 3)],
    "merged": [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)],
    "removed": [(0, 0), (0, 1), (0, 2), (0, 3)],
    "retasked": [(0, 0), (0, 1), (0, 2), (0, 3)],
    "added": [(0, 0), (0, 1), (0, 2), (0, 3)],
    "converted": [(0, 0), (0, 1), (0, 2), (0, 3)],
}
"""Of which data set, and which of its episodes, the result consists."""


def recorded(source, number):
    """Pictures, state and action of an episode as it was before."""
    rng, length = np.random.default_rng([source, number]), 6 + number
    first = np.kron(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
    images = np.stack([np.roll(first, 2 * i, 0) for i in range(length)])
    return images, rng.normal(size=(length, 3)).astype(np.float32), rng.uniform(-1, 1, (length, 2)).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_every_episode_keeps_its_rows_its_instruction_and_its_frames(name):
    dataset = Dataset.open(EDITS / name)
    assert check(dataset).problems == ()
    assert dataset.numbers == tuple(range(len(CASES[name])))
    for number, (source, before) in enumerate(CASES[name]):
        images, state, action = recorded(source, before)
        rows = dataset.columns()
        here = dataset.episode_slice(number)
        assert np.array_equal(rows.action[here], action)
        assert np.array_equal(rows.state[here], state[:, :0] if name == "removed" else state)
        task = "fold" if (name, number) == ("retasked", 0) else (FIRST, SECOND)[source][before]
        assert dataset.episode(number).task == task
        assert np.abs(dataset.frames(number, "top").astype(int) - images).mean() < 12  # another episode is 80 away


def test_they_can_be_repaired_and_merged_further(tmp_path):
    repair(EDITS / "merged", tmp_path / "again")
    again, before = Dataset.open(tmp_path / "again"), Dataset.open(EDITS / "merged")
    assert np.array_equal(again.columns().action, before.columns().action)
    assert np.array_equal(again.frames(4, "top"), before.frames(4, "top"))
