"""Chunked execution: nothing changes but the cost."""

import numpy as np
import pytest

from tests.simulators.test_checker import Reusing
from vlaflow.errors import ConfigError, SpecError
from vlaflow.simulators import make
from vlaflow.simulators.chunks import ChunkEnv

ACTIONS = np.random.default_rng(3).uniform(-1, 1, (24, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def env():
    return make("metaworld/window-close-v3", size=48)


def test_a_chunk_equals_single_steps_to_the_bit(env):
    """Frames that are not rendered cannot matter."""
    env.reset(seed=1000)
    single = [env.step(a) for a in ACTIONS]
    chunked = ChunkEnv(env, n_action_steps=8)
    chunked.reset(seed=1000)
    for i in range(0, 24, 8):
        observation, reward, *_, info = chunked.step(ACTIONS[i : i + 8])
        expected = single[i + 7]
        assert np.array_equal(observation["pixels"], expected[0]["pixels"])
        assert np.array_equal(observation["agent_pos"], expected[0]["agent_pos"])
        assert reward == pytest.approx(sum(s[1] for s in single[i : i + 8]), rel=1e-12)
        assert info["steps"] == i + 8


def test_one_image_per_chunk(env):
    """One at reset, one per chunk, none in between."""
    chunked = ChunkEnv(env, n_action_steps=8)
    before = env.renders
    chunked.reset(seed=1000)
    for i in range(0, 24, 8):
        chunked.step(ACTIONS[i : i + 8])
    assert env.renders - before == 4


def test_recording_video_does_not_disturb_the_physics(env):
    """A video renders more often and sees the same world."""
    states = []
    for video in (False, True):
        chunked = ChunkEnv(env, n_action_steps=8, video=video, video_every=3)
        chunked.restart(seed=1000)
        for i in range(0, 24, 8):
            chunked.execute(ACTIONS[i : i + 8])
        states.append(env.raw_observation.copy())
    assert np.array_equal(*states)
    assert len(chunked.frames) == 1 + 24 // 3


def test_a_longer_chunk_is_cut_and_a_shorter_one_executed_whole(env):
    """k is an upper bound."""
    chunked = ChunkEnv(env, n_action_steps=8)
    chunked.restart(seed=1000)
    assert chunked.execute(ACTIONS).steps == 8
    assert chunked.execute(ACTIONS[:3]).steps == 3


def test_an_earlier_max_steps_truncates_inside_a_chunk(env):
    """The step limit cuts where it falls, not at the end of a chunk."""
    chunked = ChunkEnv(env, n_action_steps=8, max_steps=12)
    chunked.restart(seed=1000)
    assert not chunked.execute(ACTIONS[:8]).done
    last = chunked.execute(ACTIONS[8:16])
    assert (last.steps, last.truncated) == (4, True)


@pytest.mark.parametrize("chunk", [np.zeros(4), np.zeros((0, 4)), np.zeros((8, 3))])
def test_a_chunk_of_another_shape_is_refused(env, chunk):
    """The message says which shape is wanted."""
    with pytest.raises(SpecError, match=r"\(L, 4\)"):
        ChunkEnv(env).execute(chunk)


def test_executing_no_steps_is_refused(env):
    """It would loop for ever."""
    with pytest.raises(ConfigError):
        ChunkEnv(env, n_action_steps=0)


def test_frames_of_a_video_and_observations_survive_an_environment_that_draws_into_one_array():
    env = ChunkEnv(Reusing("pass-v0", size=32), n_action_steps=4, video=True, video_every=1)
    env.restart(seed=1000)
    first, state = env.observe(), env.observe().state.copy()
    env.execute(np.full((4, 2), 0.5, np.float32))
    assert len({frame.tobytes() for frame in env.frames}) == 5
    assert first.images["above"].tobytes() == env.frames[0].tobytes()
    assert np.array_equal(first.state, state)
