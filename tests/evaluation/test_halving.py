"""Successive halving: every candidate plays the same seeds, the better half goes on, and the best one survives."""

import re

import pytest

from vlaflow.errors import ConfigError
from vlaflow.evaluation.halving import halve, require_episodes


class Arms:
    """Candidate i loses with probability (or as a number) ``loss[i]``; notes who played which seeds."""

    def __init__(self, loss):
        self.loss, self.calls = loss, []

    def __call__(self, alive, first, count):
        self.calls.append((tuple(alive), first, count))
        return [self.loss[n] for n in alive]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 21])
@pytest.mark.parametrize("budget", [200, 1200])
def test_the_best_survives_within_the_budget_on_consecutive_seeds(count, budget):
    arms = Arms([((7 * n) % count) / count for n in range(count)])
    alive, seeds = halve(range(count), arms, budget, key=lambda n: n)
    assert arms.loss[alive[0]] == min(arms.loss)
    assert len(alive) == min(count, 2)
    assert sum(len(a) * c for a, _, c in arms.calls) <= budget
    assert sum(len(a) * c for a, _, c in arms.calls) >= 0.7 * budget - count
    begins = [first for _, first, _ in arms.calls]
    assert begins == [sum(c for _, _, c in arms.calls[:i]) for i in range(len(begins))]
    assert seeds == sum(c for _, _, c in arms.calls)
    for (before, _, few), (after, _, more) in zip(arms.calls, arms.calls[1:], strict=False):
        assert set(after) < set(before)
        assert more >= few


def test_ties_go_to_the_smaller_key():
    alive, _ = halve(range(6), Arms([0.5] * 6), 60, key=lambda n: -n)
    assert alive == [5, 4]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 21])
@pytest.mark.parametrize("environments", [1, 3])
def test_the_number_of_episodes_that_a_refusal_names_is_enough_and_one_fewer_is_not(count, environments):
    with pytest.raises(ConfigError) as refusal:
        require_episodes(count, 0, environments)
    least = int(re.search(r"at least (\d+) episodes", str(refusal.value))[1])
    require_episodes(count, least, environments)
    arms = Arms([0.0] * count)
    halve(range(count), arms, least, key=lambda n: n, environments=environments)
    assert min(played for _, _, played in arms.calls) >= 1
    with pytest.raises(ConfigError, match="Raise --rollouts"):
        require_episodes(count, least - 1, environments)
