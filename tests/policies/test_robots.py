"""The folders of a checkpoint's robots: by whatever path, and as what they are."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests import helpers
from tests.compute.test_sampler_choice import MADE
from tests.evaluation.conftest import CONFIG, make_policy
from vlaflow.compute.calibration import FOLDER
from vlaflow.compute.sampler_choice import FILE
from vlaflow.errors import CheckpointError, ConfigError
from vlaflow.evaluation.prepared import prepare
from vlaflow.policies.base import Policy
from vlaflow.policies.lerobot import export
from vlaflow.policies.provenance import fingerprint
from vlaflow.policies.recipe import Base
from vlaflow.policies.robots import Robot, robot_folder
from vlaflow.training.planning import read_config


@pytest.fixture
def both(tmp_path):
    """A checkpoint of two robots, of which one is that of the simulator."""
    one = make_policy(rater=False)
    mine = Robot(one.action_spec, dict(one.stats), ("image",))
    other = replace(mine, action_spec=helpers.action_spec(4).with_chunk_size(8))
    made = Policy.create(one.config, one.action_spec, one.stats, 0, robots={"other": other, "mine": mine})
    made.save_pretrained(tmp_path / "both")
    return tmp_path / "both"


@pytest.mark.parametrize("where", ["both/robots/mine", "both/robots", "both", "."])
def test_a_robots_folder_is_known_by_every_path(both, tmp_path, monkeypatch, where):
    """Also from within, and through a link, where the path does not say in which checkpoint it lies."""
    (tmp_path / "link").symlink_to(both / "robots/mine")
    monkeypatch.chdir(tmp_path / where)
    relative = {"both/robots/mine": ".", "both/robots": "mine", "both": "robots/mine", ".": "link"}[where]
    policy = Policy.from_pretrained(relative)
    assert (policy.robot, policy.action_spec.robot) == ("mine", make_policy().action_spec.robot)
    assert policy.folder == robot_folder(relative, None)
    assert fingerprint(robot_folder(relative, None)) == fingerprint(both / "robots/mine")


def test_a_robots_folder_without_its_checkpoint_is_one_sentence(both, tmp_path):
    shutil.copytree(both / "robots/mine", tmp_path / "copied")
    with pytest.raises(CheckpointError, match="copied is one robot's part of a checkpoint, without the networks"):
        Policy.from_pretrained(tmp_path / "copied")


def test_a_robot_may_have_the_name_of_any_folder_of_a_checkpoint(tmp_path):
    """An export leaves out the training's own files, not a robot called after them; hidden files stay behind anywhere."""
    one = make_policy(rater=False)
    robots = {name: Robot(one.action_spec, dict(one.stats), ("image",)) for name in ("training", "calibration")}
    made = Policy.create(one.config, one.action_spec, one.stats, 0, robots=robots)
    made.save_pretrained(tmp_path / "both")
    (tmp_path / "both/training").mkdir()
    (tmp_path / "both/training/log.jsonl").write_text("{}\n")
    (tmp_path / "both/robots/training/.left").write_text("")
    export(tmp_path / "both", tmp_path / "out", "training")
    assert Policy.from_pretrained(tmp_path / "out").robot == "training"
    assert not list((tmp_path / "out").rglob("log.jsonl")) + list((tmp_path / "out").rglob(".left"))


@pytest.mark.parametrize("read", [Policy.from_pretrained, read_config], ids=["open", "plan"])
def test_a_checkpoint_of_another_version_is_refused_with_that_version(tmp_path, read):
    """A key that only a later version knows looks like damage otherwise; one of this version is damage."""
    make_policy(rater=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for version, said in (
        ("9.8.7", r"Unknown key .*written by vlaflow '9\.8\.7', and this is .*open it with that version\.$"),
        (config["vlaflow"], r"Unknown key '\S+new_thing' in \S+config\.json; (?!.*written by)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"vlaflow": version, "new_thing": 1}))
        with pytest.raises(ConfigError, match=said):
            read(tmp_path)


def test_what_belongs_to_another_checkpoint_is_refused_at_opening(both, tmp_path):
    """Not at the first observation, whose length would be blamed; or never, where a chunk is shorter than the spec says."""
    robot = json.loads((both / "robots/mine/robot.json").read_text())
    short = {key: value[:3] if isinstance(value, list) else value for key, value in robot["stats"]["state"].items()}
    for change, said in (
        ({"stats": {**robot["stats"], "action": short}}, "holds statistics of 3 action dimensions; the robot has 4"),
        ({"action_spec": {**robot["action_spec"], "chunk_size": 99}}, "names chunks of 99 actions, but config.json of 8"),
    ):
        (both / "robots/mine/robot.json").write_text(json.dumps(robot | change))
        with pytest.raises(CheckpointError, match=rf"robot\.json {said}.*copy the whole folder again"):
            Policy.from_pretrained(both, robot="mine")
    make_policy(rater=False).save_pretrained(tmp_path / "one")
    stats = json.loads((tmp_path / "one/stats.json").read_text())
    (tmp_path / "one/stats.json").write_text(json.dumps(stats | {"state": short}))
    with pytest.raises(CheckpointError, match=r"stats\.json holds statistics of a state of 3 numbers, but config\.json says 4"):
        Policy.from_pretrained(tmp_path / "one")


def test_training_continues_all_of_a_checkpoint_whichever_folder_names_it(both):
    base = Base.open(both / "robots/mine")
    assert (list(base.policy.robots), base.policy.robot, base.folder) == (["other", "mine"], None, both)
    assert base.identity()["policy"] == fingerprint(both)
    assert read_config(both / "robots/mine") == read_config(both)


def test_an_evaluation_finds_the_calibrations_of_an_exported_robot(both, tmp_path):
    """It needs no choice there, so it must not need one to be run as it was calibrated."""
    mine = both / "robots/mine"
    replace(MADE, checkpoint=fingerprint(mine)).save(mine / FOLDER / FILE)
    export(both, tmp_path / "out", "mine")
    for checkpoint in (mine, tmp_path / "out"):
        prepared = prepare(checkpoint, replace(CONFIG, computes=()))
        assert prepared.config.computes == ("auto",)
        assert prepared.policy.folder == Path(robot_folder(checkpoint, None))
