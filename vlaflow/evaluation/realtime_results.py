"""``results.json`` of episodes in real time: results of each hand-over at each delay, and paired comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from vlaflow.config import to_json
from vlaflow.evaluation.clusters import effective_size, sign_flip_test, success_SR
from vlaflow.evaluation.realtime import RealtimeEpisode, RealtimeEvaluationConfig
from vlaflow.evaluation.statistics import PairedOutcomes, paired_difference, student, wilson
from vlaflow.outputs import write_json
from vlaflow.robot.realtime import HandOver
from vlaflow.simulators.base import parse_env_name, rendering_versions, simulator_spec, step_limit
from vlaflow.versions import command_line, machine, versions

FORMAT = "vlaflow results in real time 1"


@dataclass(frozen=True)
class Cell:
    """Results of one hand-over at one delay, over all environments.

    Args:
        mode, delay_ms: the hand-over and the delay.
        episodes, successes, interval: with the 95 % Wilson interval of the rate, for ``effective_episodes``.
        per_env: successes by environment.
        steps: median control steps to success over the successful episodes; None if there are none.
        boundary_jerk, inner_jerk: means over the episodes that have one, with Student's 95 % intervals over environment seeds;
            None if none has.
        idle_share: share of the control steps at which the robot had nothing to execute.
        late_share: share of the replies that arrived after more actions than had been committed.
        effective_episodes: number of independent episodes that these are worth; fewer if environment seeds are repeated.
    """

    mode: HandOver
    delay_ms: float
    episodes: int
    successes: int
    interval: tuple[float, float]
    per_env: dict[str, int]
    steps: float | None
    boundary_jerk: tuple[float, float, float] | None
    inner_jerk: tuple[float, float, float] | None
    idle_share: float
    late_share: float
    effective_episodes: float


@dataclass(frozen=True)
class Comparison:
    """Comparison of two hand-overs at one delay on the same seeds; differences are second minus first.

    Args:
        env: environment, or "all".
        first, second, delay_ms: the two hand-overs and the delay.
        success: difference of the rates, and its 95 % interval.
        success_p: exact permutation test over environment seeds; with one noise seed, McNemar's.
        jerk: mean difference of the jerk at boundaries over episodes that have both; None if there are none.
        smoother, rougher: number of episodes in which the second has less, or more, jerk.
        jerk_p: the same test of these two numbers; with one noise seed, the sign test.
    """

    env: str
    first: HandOver
    second: HandOver
    delay_ms: float
    success: tuple[float, float, float]
    success_p: float
    jerk: float | None
    smoother: int
    rougher: int
    jerk_p: float


@dataclass(frozen=True)
class RealtimeResults:
    """The content of ``results.json``.

    Args:
        server, system, compute, compute_settings, guided, checkpoint, fingerprint, dtype: the policy, as the server says.
        envs, seeds, noise_seeds, n_action_steps, max_steps, jitter_ms, fade, rate_hz: how the episodes were run.
        cells, comparisons: the results.
        episodes: the single episodes.
        versions, command, machine: how the results were obtained.
    """

    server: str
    system: str
    compute: str
    compute_settings: str
    guided: bool
    checkpoint: str
    fingerprint: str
    dtype: str
    envs: tuple[str, ...]
    seeds: tuple[int, ...]
    noise_seeds: tuple[int, ...]
    n_action_steps: int
    max_steps: int
    jitter_ms: float
    fade: int
    rate_hz: float
    cells: tuple[Cell, ...]
    comparisons: tuple[Comparison, ...]
    episodes: tuple[RealtimeEpisode, ...]
    versions: dict[str, str]
    command: str
    machine: str

    def write(self, file: Path) -> None:
        """Write as JSON."""
        write_json(file, {"format": FORMAT, **to_json(self)})


def count(episodes: Sequence[RealtimeEpisode]) -> tuple[tuple[Cell, ...], tuple[Comparison, ...]]:
    """Cells in the order of the delays and modes, and every pair of modes at every delay, by environment and over all."""
    modes = list(dict.fromkeys(e.mode for e in episodes))
    delays = list(dict.fromkeys(e.delay_ms for e in episodes))
    of = {(m, d): [e for e in episodes if e.mode == m and e.delay_ms == d] for d in delays for m in modes}
    cells = tuple(_cell(mode, delay, mine) for (mode, delay), mine in of.items())
    envs = list(dict.fromkeys(e.env for e in episodes))
    groups = [*({env} for env in envs if len(envs) > 1), set(envs)]
    pairs = [
        _compare("all" if len(group) == len(envs) else min(group), *([e for e in of[m, d] if e.env in group] for m in pair))
        for d in delays
        for pair in combinations(modes, 2)
        for group in groups
    ]
    return cells, tuple(pairs)


def results(
    server: str, metadata: Mapping[str, Any], config: RealtimeEvaluationConfig, episodes: Sequence[RealtimeEpisode]
) -> RealtimeResults:
    """Compute the results, and add what is needed to reproduce them.

    Args:
        server, metadata: address and metadata of the server.
        config: how the episodes were run.
        episodes: all episodes.
    """
    spec = simulator_spec(parse_env_name(episodes[0].env)[0])
    cells, comparisons = count(episodes)
    return RealtimeResults(
        server=server,
        system=str(metadata["system"]),
        compute=str(metadata["compute"]),
        compute_settings=str(metadata["compute_settings"]),
        guided=bool(metadata["guided"]),
        checkpoint=str(metadata["checkpoint"]),
        fingerprint=str(metadata["fingerprint"]),
        dtype=str(metadata["dtype"]),
        envs=tuple(dict.fromkeys(e.env for e in episodes)),
        seeds=tuple(dict.fromkeys(e.seed for e in episodes)),
        noise_seeds=tuple(dict.fromkeys(e.noise_seed for e in episodes)),
        n_action_steps=config.n_action_steps or int(metadata["n_action_steps"]),
        max_steps=max(step_limit(e.env, config.max_steps) for e in episodes),
        jitter_ms=config.jitter_ms,
        fade=config.fade,
        rate_hz=spec.action.rate_hz,
        cells=cells,
        comparisons=comparisons,
        episodes=tuple(episodes),
        versions=versions() | rendering_versions((e.env for e in episodes), config.render),
        command=command_line(),
        machine=machine(),
    )


def _cell(mode: HandOver, delay_ms: float, mine: Sequence[RealtimeEpisode]) -> Cell:
    successes = sum(e.success for e in mine)
    effective = effective_size(success_SR(mine))
    interval = wilson(successes, len(mine), effective=effective)
    firsts = [e.first_success_step for e in mine if e.first_success_step is not None]
    envs = dict.fromkeys(e.env for e in mine)
    return Cell(
        mode,
        delay_ms,
        len(mine),
        successes,
        (interval.low, interval.high),
        {env: sum(e.success for e in mine if e.env == env) for env in envs},
        median(firsts) if firsts else None,
        _mean(_by_scene(mine, [e.boundary_jerk for e in mine])),
        _mean(_by_scene(mine, [e.inner_jerk for e in mine])),
        sum(e.idle for e in mine) / sum(e.steps for e in mine),
        sum(e.late for e in mine) / max(1, sum(e.chunks for e in mine)),
        effective,
    )


def _by_scene(episodes: Sequence[RealtimeEpisode], values: Sequence[float | None]) -> list[list[float]]:
    """The known values of the episodes, together where environment and seed are the same; scenes without any are left out."""
    scenes: dict[tuple[str, int], list[float]] = {}
    for episode, value in zip(episodes, values, strict=True):
        if value is not None:
            scenes.setdefault((episode.env, episode.seed), []).append(value)
    return list(scenes.values())


def _mean(scenes: Sequence[Sequence[float]]) -> tuple[float, float, float] | None:
    if not scenes:
        return None
    means = [sum(values) / len(values) for values in scenes]
    interval = student(means)
    return sum(means) / len(means), interval.low, interval.high


def _compare(env: str, first: Sequence[RealtimeEpisode], second: Sequence[RealtimeEpisode]) -> Comparison:
    outcomes = PairedOutcomes.of([e.success for e in first], [e.success for e in second])
    difference_SR = success_SR(second) - success_SR(first)
    difference = paired_difference(outcomes, effective=effective_size(difference_SR))
    known = [
        None if a.boundary_jerk is None or b.boundary_jerk is None else b.boundary_jerk - a.boundary_jerk
        for a, b in zip(first, second, strict=True)
    ]
    jerks = [each for each in known if each is not None]
    rougher_by_scene = [sum(int(np.sign(each)) for each in scene) for scene in _by_scene(first, known)]
    return Comparison(
        env,
        first[0].mode,
        second[0].mode,
        first[0].delay_ms,
        (outcomes.difference, difference.low, difference.high),
        sign_flip_test(difference_SR.sum(1).tolist()),
        sum(jerks) / len(jerks) if jerks else None,
        sum(each < 0 for each in jerks),
        sum(each > 0 for each in jerks),
        sign_flip_test(rougher_by_scene),
    )
