"""The obstacle: two good ways, nothing that says which, and a mean that is none."""

import numpy as np
import pytest

from vlaflow.data.lerobot import Dataset
from vlaflow.errors import SpecError
from vlaflow.simulators import make
from vlaflow.simulators.checker import check_environment
from vlaflow.simulators.experts import expert_for
from vlaflow.simulators.obstacle import GOAL, HAND, OBSTACLE, STEP
from vlaflow.simulators.record import RecordConfig, record

ENV = "obstacle/pass-v0"
SEEDS = range(1000, 1100)


def play(env, act):
    """The hand's path until the episode ends, and whether it succeeded."""
    path = [env.hand]
    while True:
        _, terminated, truncated, _ = env.advance(act(env))
        path.append(env.hand)
        if terminated or truncated:
            return np.array(path), terminated


def on(side):
    """The expert that passes on this side, whatever the seed says."""
    expert = expert_for(ENV)

    def act(env):
        env.side = side
        return expert(env)

    return act


def between(env):
    """The mean of the two experts' actions."""
    return (on(-1)(env) + on(1)(env)) / 2


def test_it_keeps_every_promise_of_an_environment():
    assert [f for f in check_environment(make(ENV)) if not f.passed] == []


@pytest.mark.parametrize("side", [-1, 1])
def test_either_side_leads_to_the_goal(side):
    """In every scene, past the obstacle on that side."""
    env = make(ENV)
    for seed in SEEDS:
        env.restart(seed)
        path, success = play(env, on(side))
        assert success
        assert np.linalg.norm(path - env.obstacle, axis=1).min() > HAND + OBSTACLE
        level = path[np.argmin(np.abs(path[:, 1] - env.obstacle[1]))]
        assert np.sign(level[0] - env.obstacle[0]) == side


def test_the_mean_of_both_ways_runs_into_the_obstacle():
    """In every scene; the episode is over and no success."""
    env = make(ENV)
    for seed in SEEDS:
        env.restart(seed)
        path, success = play(env, between)
        assert not success
        assert np.linalg.norm(path[-1] - env.obstacle) < HAND + OBSTACLE
        with pytest.raises(SpecError, match="is over"):
            env.advance(np.zeros(2))


def test_both_sides_are_equally_common_and_neither_can_be_observed():
    """Of 1000 fair choices, the share of one side is within 0.05 of a half with a probability of 0.998."""
    env, right = make(ENV, size=32), 0
    for seed in range(1000):
        env.restart(seed)
        right += env.side == 1
    assert abs(right / 1000 - 0.5) < 0.05
    for seed in SEEDS[:10]:
        env.restart(seed)
        seen = env.observe()
        env.restart(seed)
        env.side = -env.side
        other = env.observe()
        np.testing.assert_array_equal(seen.images["above"], other.images["above"])
        np.testing.assert_array_equal(seen.state, other.state)


def test_the_image_shows_the_hand_where_the_state_says():
    """x to the right, y up; the centre of the blue pixels lies within one pixel of the state."""
    env = make(ENV)
    for seed in SEEDS[:5]:
        env.restart(seed)
        for _ in range(5):
            env.advance(np.array([1.0, 0.5], np.float32))
        image = env.render().astype(int)
        row, column = np.nonzero((image[..., 2] > 130) & (image[..., 0] < 100))
        shown = np.array([column.mean() + 0.5, 96 - row.mean() - 0.5]) / 96
        np.testing.assert_allclose(shown, env.observe().state, atol=1 / 96)


def test_an_action_of_one_is_one_step_and_the_goal_ends_the_episode():
    env = make(ENV)
    env.restart(1000)
    before = env.hand
    env.advance(np.array([3.0, -0.5], np.float32))
    np.testing.assert_allclose(env.hand - before, [STEP, -STEP / 2], atol=1e-12)
    env.hand = env.goal - np.array([0.0, GOAL + STEP / 2])
    reward, terminated, truncated, info = env.advance(np.array([0.0, 1.0], np.float32))
    assert (terminated, truncated, info["first_success_step"], info["steps"]) == (True, False, 2, 2)
    assert -GOAL < reward < 0


def test_it_can_be_recorded(tmp_path):
    """With demonstrations on both sides."""
    record(RecordConfig((ENV,), episodes=6, size=32), tmp_path / "data", workers=0)
    dataset = Dataset.open(tmp_path / "data")
    columns = dataset.columns()
    assert len(dataset.episodes) == 6
    state = columns.state
    sides = {np.sign((state[columns.episode == e, 0] - 0.5)[15:30].mean()) for e in range(6)}
    assert sides == {-1, 1}
