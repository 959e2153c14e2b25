import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.toyset import LENGTHS, TASKS
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.quality import PauseRule
from vlaflow.data.windows import Windows, split_episodes
from vlaflow.errors import ConfigError, SpecError


@pytest.fixture(scope="module")
def cached(pristine, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLAFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        dataset = Dataset.open(pristine)
        yield dataset, FrameCache.open(dataset)


@pytest.mark.parametrize("chunk_size", [1, 4, 40])
def test_batch_equals_a_loop_over_frames(cached, chunk_size):
    """The slow and plain way to say what a sample is, for every frame of the data set."""
    dataset, cache = cached
    windows = Windows(dataset, cache, chunk_size)
    batch = windows.batch(np.arange(len(windows)))
    sample = 0
    for episode, length in enumerate(LENGTHS):
        rows = dataset.episode_slice(episode)
        state, action = dataset.columns().state[rows], dataset.columns().action[rows]
        images = dataset.frames(episode, "corner")
        for frame in range(length):
            wanted = [action[min(frame + step, length - 1)] for step in range(chunk_size)]
            assert np.array_equal(batch.action_BLD[sample].numpy(), np.stack(wanted))
            assert batch.valid_BL[sample].tolist() == [frame + step < length for step in range(chunk_size)]
            assert np.array_equal(batch.observation.state_BS[sample].numpy(), state[frame])
            assert np.array_equal(batch.observation.images["corner"][sample].numpy(), images[frame])
            assert batch.observation.instructions[sample] == TASKS[episode]
            assert (int(batch.episode_B[sample]), int(batch.frame_B[sample])) == (episode, frame)
            sample += 1
    assert sample == len(windows)


def test_batch_keeps_the_order_of_its_indices(cached):
    windows = Windows(*cached, 4)
    indices = np.array([40, 3, 3, 11])
    batch = windows.batch(indices)
    for place, index in enumerate(indices):
        one = windows.batch(np.array([index]))
        assert np.array_equal(batch.action_BLD[place], one.action_BLD[0])
        assert np.array_equal(batch.observation.images["image"][place], one.observation.images["image"][0])


def test_only_the_chosen_episodes_are_sampled(cached):
    windows = Windows(*cached, 4, episodes=(1, 3))
    batch = windows.batch(np.arange(len(windows)))
    assert len(windows) == LENGTHS[1] + LENGTHS[3]
    assert set(batch.episode_B.tolist()) == {1, 3}


def test_pauses_are_not_valid_but_keep_their_actions(cached):
    """A rule so coarse that whole runs of these random actions are pauses; the mask follows the rows into every window."""
    dataset, cache = cached
    windows = Windows(dataset, cache, 6, pause_rule=PauseRule(threshold=0.8, minimum_s=0.05))
    plain = Windows(dataset, cache, 6)
    assert 0 < windows.pause_N.mean() < 1
    assert not windows.pause_N[[e.start for e in dataset.episodes]].any()
    every = np.arange(len(windows))
    with_rule, without = windows.batch(every), plain.batch(every)
    assert np.array_equal(with_rule.action_BLD, without.action_BLD)
    row_BL = np.minimum(every[:, None] + np.arange(6), len(dataset) - 1)
    assert np.array_equal(with_rule.valid_BL.numpy(), without.valid_BL.numpy() & ~windows.pause_N[row_BL])


def test_wrong_use_is_refused(cached, copy):
    dataset, cache = cached
    with pytest.raises(ConfigError, match="at least one action"):
        Windows(dataset, cache, 0)
    with pytest.raises(ConfigError, match="No episode"):
        Windows(dataset, cache, 4, episodes=())
    with pytest.raises(SpecError, match="no episode 9"):
        Windows(dataset, cache, 4, episodes=(9,))


@given(fraction=st.floats(0, 0.99), seed=st.integers(0, 99))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_split_is_a_partition_in_which_training_sees_every_task(cached, fraction, seed):
    train, validation = split_episodes(cached[0], fraction, seed)
    assert sorted((*train, *validation)) == list(range(5))
    assert {TASKS[i] for i in train} == set(TASKS)
    assert (train, validation) == split_episodes(cached[0], fraction, seed)
    if fraction > 0:
        assert {TASKS[i] for i in validation} == set(TASKS)
    else:
        assert validation == ()


def test_split_depends_on_the_seed(cached):
    assert len({split_episodes(cached[0], 0.3, seed) for seed in range(20)}) > 3


def test_split_holds_out_the_stated_share(cached):
    """Two thirds of three episodes and half of two."""
    _, validation = split_episodes(cached[0], 0.6, 0)
    assert sorted(TASKS[i] for i in validation) == ["open the drawer", "push the puck", "push the puck"]


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_split_refuses_other_fractions(cached, fraction):
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        split_episodes(cached[0], fraction, 0)
