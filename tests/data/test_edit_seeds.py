"""The seeds that a recording notes stay with their episodes when a data set is edited."""

import json
import shutil

import pytest

from tests.data.test_edit import missing_row
from tests.data.toyset import LENGTHS, edit_info
from vlaflow.data.edit import drop, merge, repair
from vlaflow.data.lerobot import EXTRA_KEY, Dataset

SEEDS = {"toy/push": [11, 12, 13], "toy/pull": [21, 22]}
assert len(LENGTHS) == sum(map(len, SEEDS.values()))


def with_seeds(root, seeds):
    extra = json.loads((root / "meta/info.json").read_text())[EXTRA_KEY]
    edit_info(root, **{EXTRA_KEY: {**extra, "provenance": {"seed": 0, "seeds": seeds}}})
    return root


@pytest.fixture
def recorded(pristine, tmp_path):
    return with_seeds(shutil.copytree(pristine, tmp_path / "recorded"), SEEDS)


def noted(root):
    return Dataset.open(root).provenance


def test_seeds_are_those_of_the_episodes_that_are_kept(recorded, tmp_path):
    drop(recorded, [0, 3], tmp_path / "fewer")
    assert noted(tmp_path / "fewer") == {"seed": 0, "seeds": {"toy/push": [12, 13], "toy/pull": [22]}}
    merge([recorded, tmp_path / "fewer"], tmp_path / "both")
    drop(tmp_path / "both", [1, 5], tmp_path / "last")
    first, second = noted(tmp_path / "last")["merged"]
    assert first["seeds"] == {"toy/push": [11, 13], "toy/pull": [21, 22]}
    assert second["seeds"] == {"toy/push": [13], "toy/pull": [22]}


def test_a_repair_that_leaves_an_episode_out_leaves_its_seed_out(recorded, tmp_path):
    repair(recorded, tmp_path / "whole")
    assert noted(tmp_path / "whole")["seeds"] == SEEDS
    missing_row(recorded, 1)
    repair(recorded, tmp_path / "out")
    assert noted(tmp_path / "out")["seeds"] == {"toy/push": [11, 13], "toy/pull": [21, 22]}


def test_seeds_of_equal_recordings_are_merged_too(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path / "again")
    merge([recorded, tmp_path / "again"], tmp_path / "both")
    assert [each["seeds"] for each in noted(tmp_path / "both")["merged"]] == [SEEDS, SEEDS]


def test_seeds_that_are_not_one_for_every_episode_are_left_out(pristine, tmp_path):
    root = with_seeds(shutil.copytree(pristine, tmp_path / "recorded"), {"toy/push": [11]})
    drop(root, [0], tmp_path / "fewer")
    assert noted(tmp_path / "fewer") == {"seed": 0}
