"""Latency of a chunk, by part: one process, one thread, on an otherwise idle machine.

Compute policies take turns on the same observations, so a slowdown of the machine affects all of them. Rollouts are not timed,
because they share the machine with each other and with the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlaflow.compute.base import ComputePolicy
from vlaflow.errors import ConfigError
from vlaflow.evaluation.rollout import EpisodeJob, RolloutConfig, one_thread, open_env, play
from vlaflow.evaluation.statistics import Percentiles
from vlaflow.policies.base import Policy
from vlaflow.policies.seeds import chunk_generator
from vlaflow.ranges import Count, NotNegative, Share
from vlaflow.spec import Observation

TIMED_ENVS = 8
"""Environments whose observations are timed; an episode of each is played for them, one after the other."""

PARTS = ("prefix", "first", "refine_deterministic", "rater", "refine")
"""Parts of a chunk's time in order; a part that was not run counts as 0 ms. The rest is ``other``."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds per chunk of one compute policy.

    Args:
        compute: name of the compute policy.
        chunks: number of timed chunks.
        total: from observation to actions in robot units.
        parts: percentiles of each part; "other" is the rest of each total (image resizing, units).
        mean_parts: mean of each part; they add up to ``mean``.
        mean: mean of the total.
        layer_passes: mean network layers run per chunk.
        nfe: mean decoder evaluations per chunk.
        regenerated_share: mean share of the actions that were regenerated.
        drift: for prefixes that depend on the tokens but are not run at every step: mean absolute difference, in robot units,
            from the actions with a prefix run at every step; None where the cache is exact.
    """

    compute: str
    chunks: Count
    total: Percentiles
    parts: dict[str, Percentiles]
    mean_parts: dict[str, NotNegative]
    mean: NotNegative
    layer_passes: NotNegative
    nfe: NotNegative
    regenerated_share: Share
    drift: NotNegative | None = None

    def __post_init__(self) -> None:
        if self.parts.keys() != self.mean_parts.keys():
            raise ConfigError(f"The percentiles of '{self.compute}' are of other parts than its means.")


def measure(
    policy: Policy,
    computes: Sequence[ComputePolicy],
    observations: Sequence[Observation],
    chunks: int = 60,
    warm_up: int = 3,
    *,
    timed: Callable[[], None] = lambda: None,
) -> list[Latency]:
    """Time ``chunks`` chunks of every compute policy, in turns, spread over the observations.

    Before them come up to ``warm_up`` turns that are not timed, but no more than are. ``timed`` is called after every turn
    that is.
    """
    times: dict[str, list[dict[str, float]]] = {compute.name: [] for compute in computes}
    work: dict[str, list[tuple[int, int, float]]] = {compute.name: [] for compute in computes}
    with one_thread():
        for turn in range(-min(warm_up, chunks), chunks):
            observation = observations[turn % chunks * len(observations) // chunks]
            for compute in computes:
                chunk = policy.act(observation, compute, generator=chunk_generator(turn % 2**20, 0))
                if turn < 0:
                    continue
                times[compute.name].append(dict(chunk.milliseconds))
                again = 0.0 if chunk.regenerated is None else float(chunk.regenerated.mean())
                work[compute.name].append((chunk.layer_passes, chunk.nfe, again))
            if turn >= 0:
                timed()
        drifts = {compute.name: _drift(policy, compute, observations[:chunks]) for compute in computes}
    return [replace(_summary(name, timed, work[name]), drift=drifts[name]) for name, timed in times.items()]


def _drift(policy: Policy, compute: ComputePolicy, observations: Sequence[Observation]) -> float | None:
    exact = compute.exact(policy.model)
    if exact is None:
        return None
    chunks = [
        [policy.act(each, c, generator=chunk_generator(i, 0)).actions for i, each in enumerate(observations)]
        for c in (compute, exact)
    ]
    return float(np.abs(np.array(chunks[0]) - np.array(chunks[1])).mean())


def evenly(envs: Sequence[str], most: int = TIMED_ENVS) -> list[str]:
    """At most so many of the environments, evenly spread over their order, the first one among them."""
    return [envs[i * len(envs) // most] for i in range(most)] if len(envs) > most else list(envs)


def collect_observations(
    policy: Policy, jobs: Sequence[EpisodeJob], config: RolloutConfig, *, played: Callable[[], None] = lambda: None
) -> list[Observation]:
    """The observations of these episodes, interleaved; ``played`` is called after each episode.

    Adaptive compute policies take longer in difficult scenes, so the first steps of episodes would not be representative.
    """
    episodes: list[list[Observation]] = []
    for job in jobs:
        observed: list[Observation] = []
        observe = lambda step, now, chunk, observed=observed: observed.append(now)  # noqa: E731
        play(policy, open_env(policy, job.env, config.render), job, config, before=observe)
        episodes.append(observed)
        played()
    longest = max(map(len, episodes))
    return [each[i] for i in range(longest) for each in episodes if i < len(each)]


def _summary(name: str, times: list[dict[str, float]], work: list[tuple[int, int, float]]) -> Latency:
    columns = {part: np.array([t.get(part, 0.0) for t in times]) for part in PARTS}
    total = np.array([t["total"] for t in times])
    columns["other"] = total - sum(columns.values())
    used = {part: column for part, column in columns.items() if column.any()}
    passes, nfe, again = (float(np.mean(column)) for column in zip(*work, strict=True))
    return Latency(
        compute=name,
        chunks=len(times),
        total=Percentiles.of(total.tolist()),
        parts={part: Percentiles.of(column.tolist()) for part, column in used.items()},
        mean_parts={part: float(column.mean()) for part, column in used.items()},
        mean=float(total.mean()),
        layer_passes=passes,
        nfe=nfe,
        regenerated_share=again,
    )
