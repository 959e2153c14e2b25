"""``results.json``: the measurements, their seeds and settings, and the conclusions. Written and read strictly.

``evaluations`` contains one entry per environment and compute policy; everything else is derived from its episodes or describes
how they were run. Counting is done here; the formulas are in ``statistics``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Annotated, TypeVar

from vlaflow.config import from_json
from vlaflow.errors import ConfigError, DataError
from vlaflow.evaluation.clusters import effective_size, sign_flip_test, success_SR
from vlaflow.evaluation.groups import GroupMean, by_group
from vlaflow.evaluation.latency import Latency
from vlaflow.evaluation.power import detectable_difference, pairs_needed
from vlaflow.evaluation.revision import Revision
from vlaflow.evaluation.rollout import EpisodeResult
from vlaflow.evaluation.statistics import Interval, PairedOutcomes, Percentiles, paired_difference, wilson
from vlaflow.nn.precision import Dtype
from vlaflow.outputs import write_json
from vlaflow.ranges import Count, NotNegative, Number, Positive, Range, Seed, Share
from vlaflow.simulators.base import protocol_limits, step_limit
from vlaflow.strict import read_json
from vlaflow.text import shown

T = TypeVar("T")
FORMAT = "vlaflow results 1"
Difference = Annotated[float, Range(-1, 1)]
ALL_PAIRS = 4
"""Largest number of compute policies for which every pair is tested; with more, there would be too many tests."""


@dataclass(frozen=True)
class Within:
    """Successes that an evaluation with the step limit of a published one would have counted.

    Args:
        protocol: name of the published evaluation, see ``SimulatorSpec.protocols``.
        max_steps: its step limit.
        successes: number of episodes whose first success is not later.
    """

    protocol: str
    max_steps: Count
    successes: Number


@dataclass(frozen=True)
class Evaluation:
    """One compute policy in one environment.

    Args:
        env, compute: names.
        episodes, successes: counts.
        interval: 95 % Wilson interval of the success rate, for ``effective_episodes``.
        first_success_steps: per episode, counted from 1; null without success.
        latency_ms: latency of a chunk over the observations of up to eight environments; null if not measured.
        seeds, noise_seeds: seeds of the episodes, in the order of all lists here.
        within: successes within the limits of published evaluations, as far as they do not exceed ``max_steps``.
        n_action_steps, max_steps, render, batch: how the episodes were run.
        solver_steps: solver steps per round of compute policies whose name states none.
        nfe_per_chunk, layer_passes_per_chunk, regenerated_per_chunk: means over all chunks.
        revised_per_chunk: mean number of tokens changed by each solver step; empty for decoders without tokens.
        repaired_share: share of the chunks whose tokens were not a valid encoding.
        per_episode: the single episodes.
        effective_episodes: number of independent episodes that these are worth; fewer if environment seeds are repeated.
    """

    env: str
    compute: str
    episodes: Count
    successes: Number
    interval: tuple[Share, Share]
    first_success_steps: tuple[Count | None, ...]
    latency_ms: Percentiles | None
    seeds: tuple[Seed, ...]
    noise_seeds: tuple[Seed, ...]
    within: tuple[Within, ...]
    n_action_steps: Count
    max_steps: Count
    render: str
    solver_steps: Number
    nfe_per_chunk: NotNegative
    layer_passes_per_chunk: NotNegative
    regenerated_per_chunk: NotNegative
    per_episode: tuple[EpisodeResult, ...]
    effective_episodes: Positive
    revised_per_chunk: tuple[NotNegative, ...] = ()
    repaired_share: Share = 0.0
    batch: Count = 1

    def __post_init__(self) -> None:
        counted = [(e.seed, e.noise_seed, e.first_success_step) for e in self.per_episode]
        stated = list(zip_longest(self.seeds, self.noise_seeds, self.first_success_steps, fillvalue=-1))
        low, high = self.interval
        sound = self.episodes == len(counted) and self.successes == sum(e.success for e in self.per_episode)
        if counted != stated or not sound or not low - 1e-9 <= self.successes / self.episodes <= high + 1e-9:
            raise ConfigError(f"The numbers of '{self.compute}' in {self.env} are not those of its single episodes.")


@dataclass(frozen=True)
class Overall:
    """One compute policy over all environments: all episodes together, and the mean of the environments' success rates.

    Args:
        within: successes by published evaluation, as far as every environment counts them.
        by_group: the suites whose published groups were evaluated completely.
    """

    compute: str
    episodes: Count
    successes: Number
    interval: tuple[Share, Share]
    effective_episodes: Positive
    mean_over_envs: Share
    within: dict[str, Number] = field(default_factory=dict)
    by_group: tuple[GroupMean, ...] = ()


@dataclass(frozen=True)
class PairedTest:
    """Comparison of two compute policies on the same seeds and noise seeds.

    Args:
        env: an environment, or "all".
        first, second: the compute policies.
        both, only_first, only_second, neither: number of pairs of episodes in which they succeeded.
        difference: success rate of the second minus that of the first.
        interval: 95 % interval of the difference, Newcombe's method 10, for ``effective_pairs``.
        p_value: exact McNemar test; with several noise seeds, the exact permutation test over environment seeds.
        effective_pairs: number of independent pairs that these are worth; fewer if environment seeds are repeated.
        detectable: the smallest true difference that this many pairs detect with 80 % probability.
        episodes_needed: episodes per compute policy that would detect the observed difference with 80 % probability; None for a
            difference of 0.
    """

    env: str
    first: str
    second: str
    both: Number
    only_first: Number
    only_second: Number
    neither: Number
    difference: Difference
    interval: tuple[Difference, Difference]
    p_value: Share
    effective_pairs: Positive
    detectable: NotNegative
    episodes_needed: Count | None


@dataclass(frozen=True)
class LanguageResult:
    """Results of the language-swap test in one environment with one kind of instruction, on the same seeds for all kinds.

    Args:
        env: the environment.
        condition: "right", "other" or "empty".
        instruction: the instruction.
        episodes, successes, interval, seeds, first_success_steps: as in ``Evaluation``.
        max_steps: step limit of a success.
    """

    env: str
    condition: str
    instruction: str
    episodes: Count
    successes: Number
    interval: tuple[Share, Share]
    seeds: tuple[Seed, ...]
    first_success_steps: tuple[Count | None, ...]
    max_steps: Count


@dataclass(frozen=True)
class Minutes:
    """Wall time by step in minutes; null for steps that were not part of this run. ``total`` is their sum."""

    install: NotNegative | None = None
    record: NotNegative | None = None
    train: NotNegative | None = None
    rater: NotNegative | None = None
    calibrate: NotNegative | None = None
    evaluate: NotNegative | None = None
    total: NotNegative | None = None

    def summed(self) -> Minutes:
        """The same with ``total``, the sum of the known steps."""
        return replace(self, total=sum(self.steps.values()) if self.steps else None)

    @property
    def steps(self) -> dict[str, float]:
        """The steps of this run by name, without the total."""
        return {name: minutes for name, minutes in asdict(self).items() if name != "total" and minutes is not None}


@dataclass(frozen=True)
class Results:
    """The content of ``results.json``.

    Args:
        format: format of this file.
        evaluations: see ``Evaluation``.
        minutes: see ``Minutes``.
        versions: versions of all packages involved.
        command: the command that wrote this file.
        commands: the single steps, if the command ran several.
        checkpoint, fingerprint: the evaluated checkpoint and its content hash.
        machine: processor, cores and system.
        overall, paired, latency, language, revision: see their classes.
        dtype: what the networks computed in.
        engine: what computed them, in words (``Model.engine``).
    """

    evaluations: tuple[Evaluation, ...]
    minutes: Minutes
    versions: dict[str, str]
    command: str
    checkpoint: str
    fingerprint: str
    machine: str
    overall: tuple[Overall, ...]
    paired: tuple[PairedTest, ...]
    latency: tuple[Latency, ...]
    language: tuple[LanguageResult, ...] = ()
    commands: tuple[str, ...] = ()
    revision: Revision | None = None
    dtype: Dtype = "fp32"
    engine: str = "eager"
    format: str = field(default=FORMAT)

    @property
    def computes(self) -> tuple[str, ...]:
        """Compute policies in the order of the evaluation."""
        return tuple(dict.fromkeys(e.compute for e in self.evaluations))

    @property
    def envs(self) -> tuple[str, ...]:
        """Environments in the order of the evaluation."""
        return tuple(dict.fromkeys(e.env for e in self.evaluations))

    def of(self, env: str, compute: str) -> Evaluation:
        """The entry of this environment and compute policy."""
        return next(e for e in self.evaluations if (e.env, e.compute) == (env, compute))


def count(
    episodes: Sequence[EpisodeResult],
    latency: Sequence[Latency],
    *,
    n_action_steps: int,
    max_steps: int | None,
    render: str,
    solver_steps: int,
    batch: int = 1,
) -> tuple[Evaluation, ...]:
    """Compute an entry for every (environment, compute policy) of the episodes, in their order.

    Args:
        episodes, latency: the measurements.
        n_action_steps, render, solver_steps, batch: how the episodes were run.
        max_steps: step limit of all episodes; None for the suites' limits.
    """
    times = {entry.compute: entry.total for entry in latency}
    groups: dict[tuple[str, str], list[EpisodeResult]] = {}
    for episode in episodes:
        groups.setdefault((episode.env, episode.compute), []).append(episode)
    found = []
    for (env, compute), group in groups.items():
        n, successes = len(group), sum(e.success for e in group)
        effective = effective_size(success_SR(group))
        chunks = sum(e.chunks for e in group)
        firsts, limit = tuple(e.first_success_step for e in group), step_limit(env, max_steps)
        found.append(
            Evaluation(
                env=env,
                compute=compute,
                episodes=n,
                successes=successes,
                interval=_pair(wilson(successes, n, effective=effective)),
                first_success_steps=firsts,
                latency_ms=times.get(compute),
                seeds=tuple(e.seed for e in group),
                noise_seeds=tuple(e.noise_seed for e in group),
                within=_within(env, firsts, limit),
                n_action_steps=n_action_steps,
                max_steps=limit,
                render=render,
                solver_steps=solver_steps,
                nfe_per_chunk=sum(e.nfe for e in group) / chunks,
                layer_passes_per_chunk=sum(e.layer_passes for e in group) / chunks,
                regenerated_per_chunk=sum(e.regenerated for e in group) / chunks,
                per_episode=tuple(group),
                effective_episodes=effective,
                revised_per_chunk=tuple(sum(c) / chunks for c in zip_longest(*(e.revised for e in group), fillvalue=0)),
                repaired_share=sum(e.repaired for e in group) / chunks,
                batch=batch,
            )
        )
    return tuple(found)


def pool(evaluations: Sequence[Evaluation]) -> tuple[Overall, ...]:
    """Pool the episodes of every compute policy over all environments."""
    found = []
    for compute in dict.fromkeys(e.compute for e in evaluations):
        mine = [e for e in evaluations if e.compute == compute]
        n, successes = sum(e.episodes for e in mine), sum(e.successes for e in mine)
        mean = sum(e.successes / e.episodes for e in mine) / len(mine)
        effective = effective_size(success_SR([p for e in mine for p in e.per_episode]))
        interval = _pair(wilson(successes, n, effective=effective))
        groups = by_group(mine, [_within_all([e]) for e in mine])
        found.append(Overall(compute, n, successes, interval, effective, mean, _within_all(mine), groups))
    return tuple(found)


def _within(env: str, firsts: Sequence[int | None], max_steps: int) -> tuple[Within, ...]:
    """Count the first successes up to the limit of every published evaluation."""
    return tuple(
        Within(protocol, limit, sum(first is not None and first <= limit for first in firsts))
        for protocol, limit in protocol_limits(env).items()
        if limit <= max_steps
    )


def _within_all(evaluations: Sequence[Evaluation]) -> dict[str, int]:
    """Add up the successes of the published evaluations that all of these count."""
    counts = [{w.protocol: w.successes for w in e.within} for e in evaluations]
    return {protocol: sum(c[protocol] for c in counts) for protocol in counts[0] if all(protocol in c for c in counts)}


def compare(evaluations: Sequence[Evaluation]) -> tuple[PairedTest, ...]:
    """Test every pair of up to four compute policies, or each of more against the first, per environment and over all."""
    envs = list(dict.fromkeys(e.env for e in evaluations))
    computes = list(dict.fromkeys(e.compute for e in evaluations))
    pairs = list(combinations(computes, 2)) if len(computes) <= ALL_PAIRS else [(computes[0], c) for c in computes[1:]]
    found = []
    for env in [*(envs if len(envs) > 1 else []), "all"]:
        for first, second in pairs:
            sides = [
                [p for e in evaluations if e.compute == compute and env in (e.env, "all") for p in e.per_episode]
                for compute in (first, second)
            ]
            found.append(_test(env, first, second, *sides))
    return tuple(found)


def _test(
    env: str, first: str, second: str, first_episodes: Sequence[EpisodeResult], second_episodes: Sequence[EpisodeResult]
) -> PairedTest:
    """Test the episodes of two compute policies in pairs."""
    of_second = {_key(e): e for e in second_episodes}
    if {_key(e) for e in first_episodes} != of_second.keys():
        raise ConfigError(f"'{first}' and '{second}' were not evaluated on the same seeds; a paired test is impossible.")
    matched = [of_second[_key(e)] for e in first_episodes]
    table = PairedOutcomes.of([e.success for e in first_episodes], [e.success for e in matched])
    difference_SR = success_SR(matched) - success_SR(first_episodes)
    effective = effective_size(difference_SR)
    disagreement = (table.only_first + table.only_second) / table.n
    needed = pairs_needed(disagreement, table.difference)
    return PairedTest(
        env,
        first,
        second,
        table.both,
        table.only_first,
        table.only_second,
        table.neither,
        table.difference,
        _pair(paired_difference(table, effective=effective)),
        sign_flip_test(difference_SR.sum(1).tolist()),
        effective,
        detectable_difference(disagreement, effective),
        None if needed is None else math.ceil(needed * table.n / effective),
    )


def _key(episode: EpisodeResult) -> tuple[str, int, int]:
    return episode.env, episode.seed, episode.noise_seed


def write(results: Results, file: Path) -> None:
    """Write the file, whole or not at all."""
    write_json(file, asdict(results), indent=1, finite=True)


def read(file: Path) -> Results:
    """Read the file strictly.

    Raises:
        DataError: when it is missing, damaged or of another format.
        ConfigError: naming an unknown or missing key.
    """
    found = read_as(Results, file, FORMAT, f"vlaflow eval CKPT --env metaworld/drawer-open-v3 --out {file.parent}")
    if not found.evaluations:
        raise DataError(f"{file} contains no evaluation; it is damaged. Run the evaluation again.")
    return found


def read_as(kind: type[T], file: Path, expected: str, command: str) -> T:
    """Read a results file strictly.

    Args:
        kind: dataclass of the content.
        file: JSON file with a "format".
        expected: the expected format.
        command: command that writes the file, which errors name.

    Raises:
        DataError, ConfigError: see ``read``.
    """
    if not file.exists():
        raise DataError(f"There is no {file}. Write it: {command}")
    data = read_json(file, DataError, f"it is damaged. Write it again: {command}", finite=True)
    if not isinstance(data, dict) or data.get("format") != expected:
        found = shown(data.get("format")) if isinstance(data, dict) else repr(type(data).__name__)
        raise DataError(f"{file} has format {found}, but this version of vlaflow reads {expected!r}. Write it again: {command}")
    return from_json(kind, data, str(file))


def _pair(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high
