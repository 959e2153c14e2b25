"""LIBERO's scripted experts: one episode per skill, states only, with the recorder's noise."""

import numpy as np
import pytest

from tests.simulators.compiled import scenes_compiled_once
from tests.simulators.libero_catalogue import needs_libero
from vlaflow.errors import CapabilityError
from vlaflow.simulators import make
from vlaflow.simulators.base import RANDOM_START, postponed
from vlaflow.simulators.experts import Noise, Noisy, episode_generator, expert_for

pytestmark = [needs_libero, pytest.mark.xdist_group("libero")]
GRIPPER = np.arange(7) == 6


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    """Tests in the same scene follow each other."""
    with scenes_compiled_once():
        yield


def play(env, seed, noise=0.1):
    """The number of steps to success; 0 without success."""
    expert = Noisy(expert_for(env.name), Noise(noise), episode_generator(env.name, seed), GRIPPER)
    env.restart(seed, RANDOM_START)
    while True:
        executed, label = expert(env)
        assert label.shape == (7,)
        assert np.abs(label).max() <= 1
        _, success, truncated, info = env.advance(executed)
        if success or truncated:
            return max(0, info["first_success_step"])


@pytest.mark.parametrize(
    ("task", "steps"),
    [
        ("spatial/9", 160),  # a bowl, gripped at its rim, down from a cabinet
        ("goal/0", 130),  # a drawer
        ("goal/5", 160),  # pushing
        ("goal/7", 140),  # a knob
        ("long/3", 260),  # a bowl into a drawer that is hardly wide enough, settled there, and the drawer shut
        ("object/1", 120),  # a flat box, gripped from above, into a basket
    ],
)
def test_an_expert_solves_its_task_with_noise(task, steps):
    """Well within the limits of the protocols, 220 and more."""
    env = make(f"libero/{task}")
    assert 0 < play(env, 10_000) < steps


def test_images_rendered_after_the_episode_are_those_of_its_moments():
    """Also of a stove's flames: its task changes MuJoCo's model when it is switched on."""
    env = make("libero/goal/7")
    env.restart(10_000, RANDOM_START)
    expert, then, later, success = expert_for(env.name), [], [], False
    while not success:
        _, success, truncated, info = env.advance(expert(env))
        assert not truncated
        if success or info["steps"] % 25 == 1:
            then.append(env.observe())
            later.append(postponed(env))
    lit = env.raw.sim.model._model.site_rgba.copy()
    env.restart(10_001, RANDOM_START)
    assert not np.array_equal(lit, env.raw.sim.model._model.site_rgba)
    for seen, shown in zip(then, (show() for show in later), strict=True):
        assert all(np.array_equal(image, shown.images[view]) for view, image in seen.images.items())
        assert np.array_equal(seen.state, shown.state)


def test_the_clean_action_is_a_function_of_the_state():
    """Asked twice, or asked meanwhile what it would do elsewhere, an expert answers the same."""
    env = make("libero/object/1")
    env.restart(10_001, RANDOM_START)
    one, other = expert_for(env.name), expert_for(env.name)
    for _ in range(60):
        label = one(env)
        assert np.array_equal(label, other(env))
        other(env, np.array([0.03, 0.0, 0.0]))
        assert np.array_equal(label, other(env))
        env.advance(label)


def test_a_dropped_object_is_picked_up_again():
    env = make("libero/object/1")
    env.restart(10_000, RANDOM_START)
    expert, dropped, success, truncated = expert_for(env.name), 0, False, False
    while not (success or truncated):
        command = expert(env)
        carried = env.raw.sim.data.get_body_xpos("cream_cheese_1_main")[2] > 0.08
        if carried or 0 < dropped < 8:  # open the hand for eight steps, once
            dropped += 1
            command[6] = -1.0 if dropped <= 8 else command[6]
        _, success, truncated, _ = env.advance(command)
    assert dropped >= 8
    assert success


def test_fingers_that_closed_on_nothing_open_on_the_way_up():
    """Who misjudges carries nothing away; the label meanwhile opens the fingers, rises, and then grips the object."""
    env = make("libero/object/1")
    env.restart(10_000, RANDOM_START)
    expert, labels, success, truncated = expert_for(env.name), [], False, False
    while len(labels) < 8:
        label = expert(env)
        _, success, truncated, _ = env.advance(expert(env, np.array([0.08, 0.0, 0.0])))
        assert not success
        assert not truncated
        fingers = env.observe().state[6:]
        if labels or fingers[0] - fingers[1] < 0.002:
            labels.append(label)
    assert all(label[2] > 0.3 and label[6] == -1 for label in labels[1:])
    assert env.raw.sim.data.get_body_xpos("cream_cheese_1_main")[2] < 0.05
    while not (success or truncated):
        _, success, truncated, _ = env.advance(expert(env))
    assert success


def test_a_task_without_a_skill_is_refused_in_one_sentence():
    env = make("libero/long/9")
    env.restart(10_000, RANDOM_START)
    with pytest.raises(CapabilityError, match="no skill moves doors"):
        expert_for(env.name)(env)
