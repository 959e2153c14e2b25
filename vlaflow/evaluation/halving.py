"""Successive halving: many candidates on few episodes, then fewer candidates on more (Jamieson and Talwalkar, 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, log2

from vlaflow.errors import ConfigError

LAST = 2
"""Candidates that play the last round."""


def rounds_of(candidates: int) -> int:
    """Rounds until ``LAST`` of so many candidates have played the last one."""
    return ceil(log2(candidates / LAST)) + 1 if candidates > LAST else 1


def require_episodes(candidates: int, budget: int, environments: int = 1) -> None:
    """Refuse a budget that does not give every candidate an episode per round and environment.

    Args:
        candidates: how many.
        budget: episodes of all candidates and environments together.
        environments: how many.

    Raises:
        ConfigError: naming the number of episodes that would do.
    """
    rounds = rounds_of(candidates)
    if budget // environments // rounds < candidates:
        where = "" if environments == 1 else f" in each of {environments} environments"
        raise ConfigError(
            f"{candidates} candidates need at least {rounds * candidates * environments} episodes, one a round{where}, and "
            f"there are {budget}. Raise --rollouts, or name fewer candidates with --compute."
        )


def halve(
    candidates: Sequence[int],
    play: Callable[[Sequence[int], int, int], Sequence[float]],
    budget: int,
    *,
    key: Callable[[int], float],
    environments: int = 1,
) -> tuple[list[int], int]:
    """Keep the better half of the candidates after each round; every round plays about equally many episodes.

    Args:
        candidates: their numbers.
        play: plays seeds ``first`` … ``first + count - 1`` with each of these candidates, called as ``(alive, first, count)``;
            returns a loss of each over all seeds it has played, in their order. Every candidate plays the same seeds.
        budget: episodes in all, one per candidate, seed and environment.
        key: breaks ties; smaller is better.
        environments: in how many each seed is played.

    Returns:
        The candidates of the last round, best first, and the number of seeds used.

    Raises:
        ConfigError: see ``require_episodes``.
    """
    alive = list(candidates)
    require_episodes(len(alive), budget, environments)
    rounds = rounds_of(len(alive))
    used = 0
    for number in range(rounds):
        count = budget // environments // rounds // len(alive)
        losses = dict(zip(alive, play(alive, used, count), strict=True))
        used += count
        alive.sort(key=lambda each: (losses[each], key(each)))
        if number < rounds - 1:
            alive = alive[: max(LAST, ceil(len(alive) / 2))]
    return alive, used
