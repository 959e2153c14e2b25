"""Scripted experts and the noise that is executed but not learned."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers import action_spec
from vlaflow.errors import ConfigError, SpecError
from vlaflow.simulators import make, simulator_spec
from vlaflow.simulators.experts import Noise, Noisy, Wandering, episode_generator, expert_for, noises

DEMO = ("drawer-open-v3", "button-press-topdown-v3", "window-close-v3")
GRIPPER = np.array([False, False, False, True])


@pytest.mark.parametrize("task", DEMO)
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_the_expert_solves_the_demo_tasks_with_and_without_noise(task, scale):
    """These three are what the tutorial trains on."""
    env = make(f"metaworld/{task}")
    for seed in (10_000, 10_001):
        expert = Noisy(expert_for(env.name), Noise(scale), episode_generator(env.name, seed), GRIPPER)
        env.restart(seed)
        done = False
        while not done:
            _, done, truncated, info = env.advance(expert(env)[0])
            assert not truncated
        assert info["first_success_step"] < 200


def test_every_task_has_an_expert():
    """The recorder promises all 50."""
    for task in simulator_spec("metaworld").tasks:
        assert callable(expert_for(f"metaworld/{task}"))


def test_the_label_is_the_clean_action_and_both_stay_in_range():
    """The expert's answer is cut to ±1 before it is stored."""
    env = make("metaworld/drawer-open-v3")
    expert = expert_for(env.name)
    noisy = Noisy(expert, Noise(0.5), episode_generator(env.name, 10_000), GRIPPER)
    env.restart(10_000)
    beyond = differs = False
    done = False
    while not done:
        raw = expert._policy.get_action(env.raw_observation)
        executed, label = noisy(env)
        assert np.array_equal(label, np.clip(raw, -1, 1))
        assert np.abs(executed).max() <= 1
        assert executed[3] == label[3]
        beyond |= bool(np.abs(raw).max() > 1)
        differs |= not np.array_equal(executed, label)
        _, done, *_ = env.advance(executed)
    assert beyond
    assert differs


def test_without_noise_the_label_is_what_is_executed():
    """Scale 0 switches it off exactly."""
    env = make("metaworld/drawer-open-v3")
    env.restart(10_000)
    executed, label = Noisy(expert_for(env.name), Noise(0.0), episode_generator(env.name, 1), GRIPPER)(env)
    assert np.array_equal(executed, label)


def test_noise_is_a_share_of_the_largest_displacement():
    """Whatever the unit of an action: 0.1 of a robot that moves by at most 0.02 metres is 2 mm, not 10 cm."""
    executed = []
    for largest in (1.0, 0.02):
        env = make("obstacle/pass-v0")
        dimensions = tuple(replace(each, low=-largest, high=largest) for each in env.action_spec.dimensions)
        env.action_spec = replace(env.action_spec, dimensions=dimensions)
        still = Noisy(lambda env, error=None: np.zeros(2), Noise(0.1), episode_generator(env.name, 1), np.zeros(2, bool))
        executed.append(np.stack([still(env)[0] for _ in range(50)]) / largest)
    np.testing.assert_allclose(*executed, rtol=1e-5)  # float32
    assert np.abs(executed[0]).max() < 0.5


def test_an_expert_that_leaves_the_range_is_refused():
    env = make("obstacle/pass-v0")
    wild = Noisy(lambda env, error=None: np.array([0.0, 1.5]), Noise(), episode_generator(env.name, 1), np.zeros(2, bool))
    with pytest.raises(SpecError, match=r"expert of obstacle/pass-v0 returned 1\.5 for 'y', which lies in \[-1, 1\]"):
        wild(env)


def test_an_expert_that_misjudges_acts_as_from_elsewhere_and_is_labelled_from_here():
    """One error for a stretch of 16 to 56 steps, then 16 to 48 sound ones."""
    env = make("metaworld/window-open-v3")
    expert = expert_for(env.name)
    noisy = Noisy(expert, Noise(0.0, misjudge=0.05), episode_generator(env.name, 10_000), GRIPPER)
    env.restart(10_000)
    wrong = []
    for _ in range(500):
        executed, label = noisy(env)
        assert np.array_equal(label, expert(env))
        error = noisy.error
        wrong.append(error is not None)
        assert np.array_equal(executed, expert(env, error))
        if error is not None:
            elsewhere = env.raw_observation.copy()
            elsewhere[:3] += error
            assert np.array_equal(executed, np.clip(expert._policy.get_action(elsewhere), -1, 1).astype(np.float32))
        env.advance(executed)
    edges = np.flatnonzero(np.diff(np.array(wrong, int)))
    lengths = np.diff(edges)
    assert len(lengths) > 4
    for length, mistaken in zip(lengths, np.array(wrong)[edges + 1], strict=False):
        assert (16 <= length <= 56) if mistaken else (16 <= length <= 48)


def test_half_of_the_misjudging_episodes_begin_wrong():
    begins = []
    for seed in range(2000):
        noise = Noise(0.0, misjudge=0.03)
        noisy = Noisy(lambda _, __=None: np.zeros(4, np.float32), noise, episode_generator("x", seed), GRIPPER)
        noisy(SimpleNamespace(name="x", action_spec=action_spec(4)))
        begins.append(noisy.error is not None)
    assert abs(np.mean(begins) - 0.5 * 33 / 65) < 0.03


def test_a_wandering_expert_takes_no_step_for_what_it_would_do_if_it_were_wrong():
    """Label and execution speak of the same point, and points last as long as without misjudging."""
    env = make("metaworld/drawer-open-v3")
    env.restart(10_000)
    plain, asked = (Wandering(expert_for(env.name), episode_generator(env.name, 1), points=2) for _ in range(2))
    for _ in range(70):
        label = asked(env)
        other = asked(env, np.full(3, 0.01))
        assert np.array_equal(label, plain(env))
        env.advance(other)


def test_misjudging_has_its_size():
    """Of the first errors of 4000 episodes, in metres along each axis; half of the episodes have none."""
    env = make("metaworld/window-open-v3")
    env.restart(10_000)
    noise, errors = Noise(0.0, misjudge=0.03), []
    for seed in range(4000):
        noisy = Noisy(lambda _, __=None: np.zeros(4, np.float32), noise, episode_generator("x", seed), GRIPPER)
        for _ in range(50):
            noisy(env)
            if noisy.error is not None:
                errors.append(noisy.error)
                break
    assert abs(len(errors) / 4000 - 0.5) < 0.03
    assert np.all(np.abs(np.std(errors, axis=0) / 0.03 - 1) < 0.08)


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_memory_keeps_the_size_of_the_noise(memory):
    """The autoregression is stationary: standard deviation `scale` at every step (500 episodes of 20 steps, within 8 %)."""
    env = make("metaworld/drawer-open-v3")
    env.restart(10_000)
    samples = []
    for seed in range(500):
        noisy = Noisy(lambda _: np.zeros(4, np.float32), Noise(0.1, memory=memory), episode_generator("x", seed), GRIPPER)
        samples.append([noisy(env)[0][:3] for _ in range(20)])
    deviation = np.std(np.array(samples), axis=(0, 2))
    assert np.all(np.abs(deviation / 0.1 - 1) < 0.08)


def test_the_noise_of_an_episode_depends_on_its_seed_and_task_only():
    """Workers may share the episodes out as they like."""
    draw = lambda name, seed: episode_generator(name, seed).standard_normal(4)  # noqa: E731
    assert np.array_equal(draw("a", 1), draw("a", 1))
    assert not np.array_equal(draw("a", 1), draw("a", 2))
    assert not np.array_equal(draw("a", 1), draw("b", 1))


def test_impossible_noise_is_refused():
    """A memory of 1 would be a constant push."""
    with pytest.raises(ConfigError):
        Noise(memory=1.0)
    with pytest.raises(ConfigError):
        Noise(misjudge=-0.01)


def test_one_memory_goes_with_every_noise_or_each_has_its_own():
    assert noises([0.1, 0.2], [0.5]) == (Noise(0.1, memory=0.5), Noise(0.2, memory=0.5))
    assert noises([0.1, 0.2], [0.0, 0.8], [0.01])[1] == Noise(0.2, memory=0.8, misjudge=0.01)
    assert noises([0.1, 0.2], [0.0, 0.8], [0.01, 0.0])[1] == Noise(0.2, memory=0.8)
    assert noises((), ()) == (Noise(),)
    assert noises((), [0.8]) == (Noise(memory=0.8),)
    with pytest.raises(ConfigError, match=r"3 value.* of --noise and 2 of --noise-memory"):
        noises([0.1, 0.2, 0.3], [0.0, 0.8])


def test_a_wandering_expert_sees_other_places_first_and_then_does_the_task():
    """Images of an expert alone show the hand on one side of everything."""
    env = make("metaworld/drawer-open-v3")
    expert = expert_for(env.name)
    wandering, hands = Wandering(expert, episode_generator(env.name, 10_000), points=2), []
    env.restart(10_000)
    for step in range(300):
        action = wandering(env)
        assert np.abs(action).max() <= 1
        assert np.array_equal(action, expert(env)) == (step >= 2 * Wandering.STEPS)
        _, done, _, _ = env.advance(action)
        hands.append(env.state[:3])
        if done:
            break
    assert done
    alone = []
    env.restart(10_000)
    for _ in range(len(hands) - 2 * Wandering.STEPS):
        env.advance(expert(env))
        alone.append(env.state[:3])
    assert np.ptp(hands, axis=0).prod() > 3 * np.ptp(alone, axis=0).prod()
