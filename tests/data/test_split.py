"""Held-out episodes are a share of the whole data set, however its tasks are spread over it."""

from types import SimpleNamespace

import numpy as np
import pytest

from vlaflow.data.windows import FEW_TASKS, fewer_episodes, require_tasks, split_episodes
from vlaflow.errors import ConfigError


def episodes_of(tasks):
    """As much of a data set as a split looks at."""
    made = [SimpleNamespace(index=i, task=f"task {task}") for i, task in enumerate(tasks)]
    rows = SimpleNamespace(task=np.array(tasks), episode=np.arange(len(made)))
    return SimpleNamespace(**vars(of(made)), tasks=[f"task {task}" for task in range(max(tasks) + 1)], columns=lambda: rows)


def of(made):
    return SimpleNamespace(root="data/made", episodes=made, numbers=tuple(range(len(made))), episode=lambda n: made[n])


MANY = np.random.default_rng(0).zipf(1.3, 4000).clip(max=3000).tolist()


@pytest.mark.parametrize("fraction", [0.02, 0.06, 0.3])
@pytest.mark.parametrize(
    "tasks", [MANY, range(4000), [*range(2000), *range(2000)], [0] * 300], ids=["zipf", "one", "two", "all"]
)
def test_the_share_is_that_of_the_whole(tasks, fraction):
    dataset = episodes_of(tasks)
    train, held = split_episodes(dataset, fraction, 0)
    assert len(held) == round(fraction * len(dataset.numbers))
    assert sorted((*train, *held)) == list(dataset.numbers)


def test_tasks_with_several_episodes_keep_one_and_few_tasks_give_one_each():
    dataset = episodes_of([0] * 50 + [1] * 2 + [2] * 3)
    train, held = split_episodes(dataset, 0.06, 0)
    names = [{dataset.episodes[n].task for n in part} for part in (train, held)]
    assert names == [{"task 0", "task 1", "task 2"}] * 2
    assert FEW_TASKS >= 3


def test_the_same_seed_gives_the_same_division_and_another_seed_another():
    dataset = episodes_of(MANY)
    assert split_episodes(dataset, 0.06, 1) == split_episodes(dataset, 0.06, 1) != split_episodes(dataset, 0.06, 2)


def test_whole_tasks_are_held_out_by_name():
    dataset = episodes_of([0, 1, 2, 1])
    assert split_episodes(dataset, 0.5, 0, ["task 1"]) == ((0, 2), (1, 3))
    dataset.columns().task[2] = 1  # a frame of it in an episode of another task
    assert split_episodes(dataset, 0.5, 0, ["task 1"]) == ((0,), (1, 2, 3))
    assert split_episodes(dataset, 0.5, 0, ["task 2"]) == ((0, 1, 2, 3), ())  # that of another data set, perhaps
    require_tasks([dataset], ["task 0", "task 1"])
    with pytest.raises(ConfigError, match="no episode of the task 'task 9' in data/made and data/made; did you mean"):
        require_tasks([dataset, dataset], ["task 9"])
    dataset = episodes_of([0, 1, 2, 1])
    with pytest.raises(ConfigError, match="every episode"):
        split_episodes(dataset, 0.5, 0, ["task 0", "task 1", "task 2"])


def test_sixteen_thousand_tasks_are_divided_by_looking_at_each_episode_once():
    """Counted, not timed: the rule before compared every task with every episode."""
    asked = 0

    class Counted:
        def __init__(self, index):
            self.index, self.name = index, f"task {index % 16_000}"

        @property
        def task(self):
            nonlocal asked
            asked += 1
            return self.name

    made = [Counted(i) for i in range(20_000)]
    dataset = of(made)
    train, _ = split_episodes(dataset, 0.06, 0)
    fewer_episodes(dataset, train, 0.5, 0)
    assert asked <= 2 * len(made)
