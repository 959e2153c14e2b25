"""Successive halving: many candidates on few episodes, then fewer candidates on more (Jamieson and Talwalkar, 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, log2

from vlaflow.errors import ConfigError

LAST = 2
"""Candidates that play the last round."""


def halve(
    candidates: Sequence[int],
    play: Callable[[Sequence[int], int, int], Sequence[float]],
    budget: int,
    *,
    key: Callable[[int], float],
) -> tuple[list[int], int]:
    """Keep the better half of the candidates after each round; every round plays about equally many episodes.

    Args:
        candidates: their numbers.
        play: plays seeds ``first`` … ``first + count - 1`` with each of these candidates, called as ``(alive, first, count)``;
            returns a loss of each over all seeds it has played, in their order. Every candidate plays the same seeds.
        budget: episodes in all, one per candidate and seed.
        key: breaks ties; smaller is better.

    Returns:
        The candidates of the last round, best first, and the number of seeds used.

    Raises:
        ConfigError: the budget does not give every candidate an episode per round.
    """
    alive = list(candidates)
    rounds = max(1, ceil(log2(max(len(alive), 1) / LAST)) + 1) if len(alive) > LAST else 1
    if budget // rounds < len(alive):
        raise ConfigError(
            f"{len(alive)} candidates need at least {rounds * len(alive)} episodes per environment in {rounds} rounds, and "
            f"there are {budget}. Raise --rollouts, or name fewer candidates with --compute."
        )
    used = 0
    for number in range(rounds):
        count = budget // rounds // len(alive)
        losses = dict(zip(alive, play(alive, used, count), strict=True))
        used += count
        alive.sort(key=lambda each: (losses[each], key(each)))
        if number < rounds - 1:
            alive = alive[: max(LAST, ceil(len(alive) / 2))]
    return alive, used
