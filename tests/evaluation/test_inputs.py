"""Which inputs actions follow: shares in closed form, networks that are blind to one input, and the command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.training.small import SPEC, new_policy, tiny_config, tiny_policy
from vlaflow.cli.main import main
from vlaflow.compute.parse import parse
from vlaflow.data.lerobot import Dataset
from vlaflow.data.writer import Writer
from vlaflow.errors import CalibrationError
from vlaflow.evaluation.calibrate import Sample, sample
from vlaflow.evaluation.inputs import ALL_VIEWS, INSTRUCTION, STATE, followed, measure, partners

VIEWS = ("front", "wrist")


def write(root, tasks=("push the puck", "open the drawer"), episodes=6):
    """Noise in two views, states and actions."""
    views = dict.fromkeys(VIEWS, (32, 32))
    with Writer(
        root, fps=10, action_spec=SPEC, state_names=("x", "y", "z"), views=views, robot_type="test", provenance={}
    ) as writer:
        for episode in range(episodes):
            rng = np.random.default_rng(episode)
            length = 9 + episode
            images = {view: rng.integers(0, 256, (length, 32, 32, 3), np.uint8) for view in VIEWS}
            state = rng.standard_normal((length, 3)).astype(np.float32)
            action = rng.uniform(-1, 1, (length, 2)).astype(np.float32)
            writer.add(images, state, action, tasks[episode % len(tasks)])
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write(tmp_path_factory.mktemp("inputs") / "dataset")


@pytest.fixture
def policy():
    made = new_policy(tiny_config(tiny_policy(VIEWS)))
    made.model.eval()
    return made


def blind(module):
    """Whatever the input, the output is zero."""
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)


def found(policy, dataset, frames=24):
    data = Dataset.open(dataset)
    report = measure(policy, parse("dense:2"), sample(policy, data, data.numbers, frames))
    return report, {use.name: use for use in report.uses}


def test_a_change_along_the_difference_is_its_share():
    apart = np.random.default_rng(0).normal(size=(40, 6))
    episode = np.repeat(np.arange(8), 5)
    assert followed(apart, apart, episode) == (pytest.approx(1), pytest.approx((1, 1)))
    assert followed(0.3 * apart, apart, episode) == (pytest.approx(0.3), pytest.approx((0.3, 0.3)))
    assert followed(0 * apart, apart, episode) == (0, (0, 0))


def test_a_change_across_the_difference_is_no_share():
    apart, moved = np.tile([1.0, 0.0], (10, 1)), np.tile([0.0, 5.0], (10, 1))
    assert followed(moved, apart, np.arange(10))[0] == 0


def test_nothing_to_follow_and_a_single_episode():
    apart = np.ones((4, 2))
    assert followed(0 * apart, 0 * apart, np.arange(4)) == (None, None)
    assert followed(apart, apart, np.zeros(4)) == (pytest.approx(1), None)


def test_the_interval_holds_the_share_as_often_as_it_says():
    """Shares that vary by episode around 0.4, on frames of an episode alike."""
    rng, inside = np.random.default_rng(1), 0
    episode = np.repeat(np.arange(12), 10)
    for _ in range(300):
        apart = rng.normal(size=(120, 4))
        share = 0.4 + 0.2 * rng.normal(size=12)[episode]
        low, high = followed(share[:, None] * apart, apart, episode)[1]
        inside += low < 0.4 < high
    assert 0.91 < inside / 300 < 0.99


def test_partners_are_of_another_episode_of_the_task_with_the_nearest_state(policy, dataset):
    data = Dataset.open(dataset)
    frames = sample(policy, data, data.numbers, 24)
    own, other = partners(frames)
    columns, rows = data.columns(), frames.windows.rows
    scaled = columns.state[rows] / columns.state[rows].std(0)
    assert len(own) == len(frames.index_N)
    for i, j in zip(own, other, strict=True):
        assert columns.task[rows[i]] == columns.task[rows[j]]
        assert columns.episode[rows[i]] != columns.episode[rows[j]]
        allowed = (columns.task[rows] == columns.task[rows[i]]) & (columns.episode[rows] != columns.episode[rows[i]])
        distance = np.square(scaled - scaled[i]).sum(1)
        assert distance[j] == pytest.approx(distance[allowed].min())


def test_without_a_state_partners_are_as_far_in_their_episodes():
    """Episodes of four and eight frames of one task."""
    episode = np.repeat([0, 1], [4, 8])
    frame = np.concatenate([np.arange(4), np.arange(8)])
    columns = SimpleNamespace(task=0 * episode, episode=episode, frame=frame, state=np.zeros((12, 0), np.float32))
    windows = SimpleNamespace(dataset=SimpleNamespace(columns=lambda: columns), rows=np.arange(12))
    own, other = partners(Sample(windows, np.arange(4), np.ones(4, bool)))
    assert own.tolist() == [0, 1, 2, 3]
    assert other.tolist() == [4, 6, 8, 10]


def test_a_network_blind_to_a_view_follows_it_by_nothing(policy, dataset):
    blind(policy.model.backbone.stems[0])
    report, uses = found(policy, dataset)
    assert list(uses) == ["front", "wrist", ALL_VIEWS, STATE, INSTRUCTION]
    assert (uses["front"].share, uses["front"].change) == (0, 0)
    assert uses["front"].error == pytest.approx(report.error)
    assert uses["wrist"].share == pytest.approx(uses[ALL_VIEWS].share)
    assert uses["wrist"].change > 0
    assert report.apart > 0
    assert (report.frames, report.episodes) == (24, 6)


def test_a_network_blind_to_all_views_follows_the_state_alone(policy, dataset):
    for stem in policy.model.backbone.stems:
        blind(stem)
    report, uses = found(policy, dataset)
    assert uses[STATE].share == pytest.approx(1)
    assert uses[STATE].change == pytest.approx(report.apart)
    assert uses[ALL_VIEWS].change == 0


def test_a_network_blind_to_the_state_follows_the_views_alone(policy, dataset):
    blind(policy.model.backbone.state)
    _, uses = found(policy, dataset)
    assert uses[ALL_VIEWS].share == pytest.approx(1)
    assert uses[STATE].change == 0


def test_a_network_blind_to_words_keeps_its_actions_under_another_instruction(policy, dataset):
    blind(policy.model.backbone.text)
    _, uses = found(policy, dataset)
    assert (uses[INSTRUCTION].share, uses[INSTRUCTION].interval, uses[INSTRUCTION].change) == (None, None, 0)


def test_one_episode_per_task_is_refused(policy, tmp_path):
    with pytest.raises(CalibrationError, match=r"No task of .* has two of the episodes"):
        found(policy, write(tmp_path / "dataset", episodes=2))


def test_the_command(policy, dataset, tmp_path, capsys):
    policy.save_pretrained(tmp_path / "policy")
    words = ["check", "inputs", str(tmp_path / "policy"), "--dataset", str(dataset), "--compute", "dense:2"]
    assert main([*words, "--episodes", "all", "--frames", "16", "--json", str(tmp_path / "inputs.json")]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("front", "wrist", ALL_VIEWS, STATE, INSTRUCTION, "16 frames of 6 episodes, dense:2"))
    report = json.loads((tmp_path / "inputs.json").read_text())
    assert [use["name"] for use in report["uses"]] == ["front", "wrist", ALL_VIEWS, STATE, INSTRUCTION]


def test_a_checkpoint_that_does_not_say_what_it_was_trained_on_is_refused(policy, dataset, tmp_path, capsys):
    policy.save_pretrained(tmp_path / "policy")
    assert main(["check", "inputs", str(tmp_path / "policy"), "--dataset", str(dataset)]) == 2
    assert "pass --episodes all" in capsys.readouterr().err
