"""Success over the groups of a suite's tasks, and the mean of the groups, which is what published tables rank policies by.

Meta-World's groups differ in size (28, 11, 6 and 5 tasks), so the mean of the groups is not the mean of the tasks: the hard and
very hard tasks are half of the former and 22 % of the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vlaflow.evaluation.statistics import Interval, mean_interval, wilson
from vlaflow.ranges import Count, Number, Share
from vlaflow.simulators.base import published_groups


class Counted(Protocol):
    """Episodes of one environment and compute policy, as ``results.Evaluation`` counts them."""

    @property
    def env(self) -> str:
        """Its name."""

    @property
    def episodes(self) -> int:
        """Their number."""

    @property
    def successes(self) -> int:
        """The successful ones."""

    @property
    def effective_episodes(self) -> float:
        """The number of independent episodes that they are worth."""


@dataclass(frozen=True)
class GroupRate:
    """Success over the tasks of a group, which all have the same number of episodes.

    Args:
        group: its name, such as "easy".
        envs: number of tasks.
        episodes, successes: counts.
        interval: 95 % Wilson interval of the success rate, for as many independent episodes as these are worth.
        within: successes by published evaluation, as in ``results.Overall``.
    """

    group: str
    envs: Count
    episodes: Count
    successes: Number
    interval: tuple[Share, Share]
    within: dict[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupMean:
    """The groups of a suite, and the mean of their success rates: each counts the same, however many tasks it has.

    Args:
        suite: its name.
        groups: all groups that published tables list.
        mean: of their success rates.
        interval: 95 % interval of the mean, see ``statistics.mean_interval``.
        within: the mean by published evaluation.
    """

    suite: str
    groups: tuple[GroupRate, ...]
    mean: Share
    interval: tuple[Share, Share]
    within: dict[str, Share] = field(default_factory=dict)


def by_group(evaluations: Sequence[Counted], within: Sequence[dict[str, int]]) -> tuple[GroupMean, ...]:
    """Count one compute policy's episodes by group, for every suite whose published groups were evaluated completely.

    Args:
        evaluations: one per environment.
        within: of each of them, the successes by published evaluation.
    """
    counts = {entry.env: (entry, limits) for entry, limits in zip(evaluations, within, strict=True)}
    found = []
    for suite in dict.fromkeys(env.partition("/")[0] for env in counts):
        groups = published_groups(suite)
        if groups and all(env in counts for envs in groups.values() for env in envs):
            found.append(_mean(suite, [_rate(group, [counts[env] for env in envs]) for group, envs in groups.items()]))
    return tuple(found)


def _rate(group: str, counts: Sequence[tuple[Counted, dict[str, int]]]) -> GroupRate:
    n, successes = (sum(getattr(entry, name) for entry, _ in counts) for name in ("episodes", "successes"))
    found = wilson(successes, n, effective=sum(entry.effective_episodes for entry, _ in counts))
    protocols = [protocol for protocol in counts[0][1] if all(protocol in limits for _, limits in counts)]
    within = {protocol: sum(limits[protocol] for _, limits in counts) for protocol in protocols}
    return GroupRate(group, len(counts), n, successes, (found.low, found.high), within)


def _mean(suite: str, groups: Sequence[GroupRate]) -> GroupMean:
    rates = [group.successes / group.episodes for group in groups]
    found = mean_interval(rates, [Interval(*group.interval) for group in groups])
    protocols = [protocol for protocol in groups[0].within if all(protocol in group.within for group in groups)]
    within = {p: sum(group.within[p] / group.episodes for group in groups) / len(groups) for p in protocols}
    return GroupMean(suite, tuple(groups), sum(rates) / len(rates), (found.low, found.high), within)
