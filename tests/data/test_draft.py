"""Drafted action specs: what is taken from a data set and from well-known robots, and that nothing else is claimed."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.data.cases.build import feature, no_spec
from tests.data.toyset import SPEC, edit_info
from vlaflow.cli import data as command
from vlaflow.config import to_json
from vlaflow.data.draft import _from_names, draft
from vlaflow.data.known_robots import ARM, SO_ARM, Clues, recognise
from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.errors import ConfigError, SpecError
from vlaflow.simulators.libero_tasks import ACTION as LIBERO
from vlaflow.simulators.metaworld_tasks import ACTION as METAWORLD


@pytest.fixture
def plain(pristine, tmp_path):
    """A data set as everyone but vlaflow writes it."""
    root = shutil.copytree(pristine, tmp_path / "plain")
    no_spec(root)
    return root


def clues(words, count, low=-0.9, high=0.9, names=None):
    names = names or tuple(map(str, range(count)))
    return Clues(words, tuple(names), np.full(count, low), np.full(count, high))


def test_plain_no_spec_gets_ranges_rate_names_and_robot_of_the_data(plain):
    dataset = Dataset.open(plain)
    spec = draft(dataset).spec
    action = dataset.columns().action
    assert (spec.robot, spec.rate_hz) == ("toy", dataset.fps)
    assert [d.name for d in spec.dimensions] == [d.name for d in SPEC.dimensions]
    assert (spec.low < action.min(0)).all()
    assert (action.max(0) < spec.high).all()
    np.testing.assert_allclose((spec.high - spec.low) / np.ptp(action, axis=0), 1.2, rtol=1e-5)
    assert all(d.measured for d in spec.dimensions)


def test_what_nobody_said_is_unstated_and_said_to_be(plain):
    drafted = draft(Dataset.open(plain))
    assert [d.unit for d in drafted.spec.dimensions] == ["unstated"] * 3
    assert [d.mode for d in drafted.spec.dimensions] == ["delta", "delta", "absolute"]
    assert "unit of all dimensions" in drafted.words
    assert "gripper; " in drafted.words


def test_a_draft_matches_the_spec_it_lacks_and_no_other(plain):
    spec = draft(Dataset.open(plain)).spec
    spec = replace(spec, robot="unstated")  # meta/info.json has another name for it
    spec.require_match(SPEC, "a", "b")
    other = replace(SPEC, dimensions=tuple(replace(d, mode="absolute") for d in SPEC.dimensions))
    with pytest.raises(SpecError, match="mode of action dimension 'dx'"):
        spec.require_match(other, "a", "b")


@pytest.mark.parametrize(
    ("names", "rotation"),
    [
        (["x", "y", "z", "axis_angle_1", "axis_angle_2", "axis_angle_3"], "axis-angle"),
        (["x", "y", "z", "qx", "qy", "qz", "qw", "gripper"], "quaternion xyzw"),
        (["x", "y", "z", "qw", "qx", "qy", "qz", "gripper"], "quaternion wxyz"),
        (["x", "y", "z", "roll", "pitch", "yaw", "gripper"], "unstated"),
        (["x", "y", "z", "rx", "ry", "rz", "gripper"], "unstated"),
        (["joint_0", "joint_1", "gripper"], "none"),
        (["wrist_roll", "elbow"], "none"),
        (["left", "right"], "unstated"),
        (None, "unstated"),
    ],
)
def test_rotations_are_stated_only_where_names_tell(names, rotation):
    spec = _from_names(names or ("0", "1"), "", 10.0)
    assert spec.rotation == rotation
    assert spec.robot == "unstated"


def test_dimensions_without_names_match_all_names(plain):
    feature(plain, "action", names=None)
    spec = draft(Dataset.open(plain)).spec
    assert [d.name for d in spec.dimensions] == ["unnamed 0", "unnamed 1", "unnamed 2"]
    assert all(mine.differs(theirs) is None for mine, theirs in zip(spec.dimensions, SPEC.dimensions, strict=True))


@pytest.mark.parametrize(
    ("given", "title", "gripper"),
    [
        (clues("panda libero_spatial", 7), "LIBERO", LIBERO.gripper),
        (clues("metaworld_sawyer mine", 4), "Meta-World", METAWORLD.gripper),
        (clues("aloha mine", 14, 0, 1), "ALOHA", "0 closed, 1 open"),
        (clues("aloha mine", 14, -3, 3), "ALOHA", "unstated"),
        (clues("mine", 14, 0, 1, [f"{s}_{j}" for s in "lr" for j in (*ARM, "gripper")]), "ALOHA", "0 closed, 1 open"),
        (clues("so101_follower mine", 6, -90, 90), "SO-100/101", "0 closed, 100 open"),
        (clues("mine", 6, names=[f"{j}.pos" for j in (*SO_ARM, "gripper")]), "SO-100/101", "0 closed, 100 open"),
        (clues("widowx bridge", 7), "WidowX (BridgeData)", "0 closed, 1 open"),
        (clues("droid", 8, 0, 1), "Franka (DROID)", "0 open, 1 closed"),
        (clues("franka mine", 7), "Franka", "unstated"),
    ],
)
def test_known_robots_are_recognised(given, title, gripper):
    found = recognise(given, 50.0)
    assert (found.title, found.spec.gripper, found.spec.rate_hz) == (title, gripper, 50.0)
    assert found.spec.dim == len(given.names)


@pytest.mark.parametrize("given", [clues("mine", 7), clues("libero", 6), clues("metaworld", 4, -2, 2), clues("so100", 7)])
def test_others_are_not(given):
    assert recognise(given, 10.0) is None


def test_the_units_of_so_arms_are_stated_only_where_they_must_be_degrees():
    assert recognise(clues("so100", 6, -90, 90), 30).spec.dimensions[0].unit == "unstated"
    assert recognise(clues("so100", 6, -90, 170), 30).spec.dimensions[0].unit == "degrees"


def test_data_spec_writes_what_action_spec_reads(plain, tmp_path, capsys):
    file = tmp_path / "spec.json"
    assert command.main(["spec", str(plain), "--out", str(file)]) == 0
    assert "Unstated" in capsys.readouterr().err
    edited = json.loads(file.read_text()) | {"gripper": "0 open, 1 closed"}
    file.write_text(json.dumps(edited))
    opened = Dataset.open(plain, reading=Reading.of(spec=file))
    assert opened.action_spec.gripper == "0 open, 1 closed"
    with pytest.raises(ConfigError, match="completed by hand"):
        command.main(["spec", str(plain), "--out", str(file)])
    assert command.main(["spec", str(plain)]) == 0
    assert json.loads(capsys.readouterr().out)["gripper"] == "unstated"


def test_a_file_that_contradicts_the_data_set_is_refused(plain, tmp_path):
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(to_json(SPEC) | {"robot": "another arm"}))
    edit_info(plain, x_vlaflow={"action_spec": to_json(SPEC)})
    with pytest.raises(SpecError, match="robot is 'toy arm' in the first and 'another arm' in the second"):
        Dataset.open(plain, reading=Reading.of(spec=file))
    file.write_text("[")
    with pytest.raises(ConfigError, match="vlaflow data spec"):
        Reading.of(spec=file)
