"""Data sets as everyone but vlaflow writes them are trained on by one command: no spec, no state, four cameras of two sizes."""

import json
import re

import numpy as np
import pytest

from tests.data.cases.build import renamed
from tests.data.toyset import edit_info
from tests.serving.live import serving
from tests.training.test_run import arguments
from vlaflow.cli import calibrate, data
from vlaflow.cli import train as command
from vlaflow.data.lerobot import Dataset
from vlaflow.data.writer import Writer
from vlaflow.errors import DataError, SpecError
from vlaflow.policies.base import Policy
from vlaflow.policies.example import example
from vlaflow.policies.provenance import new_episodes, trained_on
from vlaflow.robot.client import Client
from vlaflow.serving.observation_keys import choose, read
from vlaflow.spec import ActionSpec, Dimension

ALOHA = [f"{side}_{part}" for side in ("left", "right") for part in
         ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")]  # fmt: skip
CAMERAS = {"cam_high": (32, 48), "cam_low": (32, 48), "cam_left_wrist": (24, 32), "cam_right_wrist": (24, 32)}


def write(root, *, names, state=True, views, fps=50, robot="aloha", task="fold the shirt"):
    """Four short episodes, whose meaning nobody states."""
    dimensions = tuple(Dimension(name, "rad", "joint", -2, 2, "up", "absolute") for name in names)
    spec = ActionSpec("removed below", dimensions, "none", "none", fps)
    states = tuple(names) if state else ("none",)
    with Writer(root, fps=fps, action_spec=spec, state_names=states, views=views, robot_type=robot, provenance={}) as writer:
        for number in range(4):
            rng = np.random.default_rng(number)
            images = {view: rng.integers(0, 256, (7, *size, 3), np.uint8) for view, size in views.items()}
            writer.add(images, rng.normal(size=(7, len(states))), rng.uniform(0, 1, (7, len(names))), task)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    if not state:
        del features["observation.state"]
    edit_info(root, x_vlaflow={}, features=features)
    return root


@pytest.fixture(scope="module")
def aloha(tmp_path_factory):
    return write(tmp_path_factory.mktemp("aloha") / "dataset", names=ALOHA, views=CAMERAS)


def act(folder):
    """One chunk of a checkpoint."""
    policy = Policy.from_pretrained(folder)
    return policy.act(example(policy)).actions


def test_aloha_four_cameras_trains_on_all_four_and_keeps_the_drafted_spec(aloha, tmp_path, capsys):
    out = tmp_path / "policy"
    assert command.main([*arguments(aloha, out), "--steps", "1"]) == 0
    said = capsys.readouterr().err
    assert "recognised as ALOHA" in said
    assert f"vlaflow data spec {aloha} --out FILE" in said
    policy = Policy.from_pretrained(out)
    assert tuple(policy.model.backbone.views) == tuple(CAMERAS)
    assert policy.action_spec.gripper == "0 closed, 1 open"
    assert act(out).shape == (policy.chunk_size, 14)


def test_the_walk_of_your_robot_ends_with_chunks_for_the_client_of_either_robot(aloha, tmp_path):
    """docs/your-robot.md: check, spec, train, calibrate, serve, drive, with two robots that nobody describes: 14 joints, four
    cameras and 50 Hz; and seven numbers, two cameras, 15 Hz and other names of columns.
    """
    views, out = {"front": (32, 32), "cam_left_wrist": (24, 32)}, tmp_path / "policy"
    other = write(tmp_path / "franka", names=[f"a{i}" for i in range(7)], views=views, fps=15, robot="franka")
    renamed(other, action="actions", observation__state="state")
    with pytest.raises(DataError) as refused:
        data.main(["check", str(other)])
    keys = re.findall(r"--key (\S+)", str(refused.value))
    options = [word for key in keys for word in ("--key", key)]
    own = ["--chunk-seconds", "0.1", "--steps", "1", "--set", "validation_fraction=0.5", "--dataset", f"franka={other}"]
    own += [word for key in keys for word in ("--key", f"franka:{key}")]
    for name, root, added in (("arms", aloha, []), ("franka", other, options)):
        file = tmp_path / f"{name}.json"
        assert data.main(["check", str(root), *added]) == 0
        assert data.main(["spec", str(root), *added, "--out", str(file)]) == 0
        own += ["--action-spec", f"{name}:{file}"]
    assert command.main([*arguments(f"arms={aloha}", out), *own]) == 0
    made = ["--sampler", "--compute", "dense:1", "--compute", "dense:2", "--frames", "4"]
    assert calibrate.main([str(out), "--robot", "franka", "--dataset", str(other), *made]) == 0

    def driven(robot, keys, sizes):
        policy = Policy.from_pretrained(out, robot=robot)
        images = {name: np.zeros((3, *size), np.uint8) for name, size in sizes.items()}
        with serving(policy, place=choose(keys, tuple(policy.views))) as (_, address), Client(address) as client:
            state = np.zeros(client.metadata["state_dim"])
            return client.metadata, client.infer({"images": images, "state": state, "prompt": "fold the shirt"})["actions"]

    about, actions = driven("arms", "aloha", CAMERAS)
    assert (about["robot"], about["action_spec"]["robot"], about["rate_hz"]) == ("arms", "aloha, joint targets", 50)
    assert (about["n_action_steps"], actions.shape) == (2, (5, 14))
    about, actions = driven("franka", "views", views)
    assert about["images"].keys() == {"images/front", "images/cam_left_wrist"}
    assert (about["action_spec"]["rotation"], about["chunk_seconds"], actions.shape) == ("unstated", 2 / 15, (2, 7))


def test_views_are_chosen_among_the_four(aloha, tmp_path):
    chosen = ("--view", "cam_high", "--view", "wrist=cam_left_wrist", "--steps", "1")
    assert command.main([*arguments(aloha, tmp_path / "policy"), *chosen]) == 0
    assert tuple(Policy.from_pretrained(tmp_path / "policy").model.backbone.views) == ("cam_high", "wrist")


def test_no_state_trains_a_policy_without_proprioception(tmp_path):
    root = write(tmp_path / "dataset", names=("a0", "a1"), state=False, views={"top": (32, 48)}, fps=10, robot="toy")
    assert Dataset.open(root).dim("state") == 0
    assert command.main([*arguments(root, tmp_path / "policy"), "--steps", "1"]) == 0
    policy = Policy.from_pretrained(tmp_path / "policy")
    request = {"images/top": np.zeros((32, 48, 3), np.uint8), "prompt": "fold the shirt"}
    place = choose("views", tuple(policy.views), stateless=not policy.stats["state"].dim)
    assert policy.act(read(request, **place)).actions.shape[1] == 2


def test_a_completed_spec_is_used_and_a_contradicting_one_refused_later(aloha, tmp_path):
    file = tmp_path / "spec.json"
    assert data.main(["spec", str(aloha), "--out", str(file)]) == 0
    file.write_text(file.read_text().replace('"aloha, joint targets"', '"our aloha"'))
    out, spec = tmp_path / "policy", ("--action-spec", str(file))
    assert command.main([*arguments(aloha, out, *spec), "--steps", "1"]) == 0
    assert Policy.from_pretrained(out).action_spec.robot == "our aloha"
    file.write_text(file.read_text().replace('"our aloha"', '"other"'))
    words = ["asyncvla.rater", "--dataset", str(aloha), "--out", str(tmp_path / "rated"), "--policy", str(out), *spec]
    with pytest.raises(SpecError, match="'our aloha' in the first and 'other' in the second"):
        command.main([*words, "--steps", "1", "--batch-size", "4", "--tracker", "none", "--no-calibrate"])


def test_an_instruction_that_is_too_long_is_found_at_the_start_with_a_size_that_does(tmp_path):
    root = write(tmp_path / "dataset", names=("a0", "a1"), views={"top": (32, 48)}, fps=10, robot="toy", task="fold " * 20)
    words = [*arguments(root, tmp_path / "policy"), "--steps", "1"]
    with pytest.raises(SpecError, match=r"of episode 0 of .* has 100 bytes.*--set policy\.backbone\.text_bytes=128") as refused:
        command.main(words)
    assert command.main([*words, *str(refused.value).rpartition("For a new policy: ")[2].split()]) == 0


def test_a_task_is_held_out_and_stays_new_to_the_policy(dataset, tmp_path):
    out = tmp_path / "policy"
    assert command.main([*arguments(dataset, out, "--hold-out-task", "open the drawer"), "--steps", "1"]) == 0
    opened = Dataset.open(dataset)
    new = [opened.episode(number).task for number in new_episodes(opened, trained_on(out))]
    assert new == ["open the drawer"] * 3
