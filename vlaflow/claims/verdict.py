"""From the outcomes of a claim's arms to its row: paired differences, corrected p-values and the verdict.

Pairs are the same task, environment seed and noise seed of the same training seed; for answers, the same question. Episodes of
one environment seed, and questions of one group, are clusters. The rule is fixed before anything is measured:

    held        every effect holds
    refuted     at least one effect is refuted
    not seen    otherwise

"More" holds if the difference is positive in every training seed and its p-value is below 0.05 after Holm's correction over
the claim's effects; it is refuted if the same is true of a negative difference. "No fewer" holds if the 95 % interval lies
above minus the margin, and is refuted if it lies below. "Cheaper" holds for less than 95 % of the cost and is refuted for
more than 105 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vlaflow.claims.base import Claim, Effect
from vlaflow.errors import DataError
from vlaflow.evaluation.clusters import effective_size, sign_flip_test
from vlaflow.evaluation.statistics import Interval, PairedOutcomes, paired_difference, wilson

LEVEL = 0.05
CHEAPER, DEARER = 0.95, 1.05
Verdict = Literal["held", "refuted", "not seen"]
Outcomes = Mapping[tuple[int, str], tuple[bool, ...]]
"""Successes by (training seed, task and environment seed), one per noise seed; for answers, by group, one per question."""


@dataclass(frozen=True)
class Measured:
    """What was measured of an arm.

    Args:
        outcomes: see ``Outcomes``.
        latency_ms: median time of a chunk, the mean over training seeds; None for answers.
        layer_passes: mean number of network layers run per chunk; None for answers.
    """

    outcomes: Outcomes
    latency_ms: float | None = None
    layer_passes: float | None = None


@dataclass(frozen=True)
class ArmRow:
    """An arm in the table.

    Args:
        arm: its name.
        n, successes: counts over all training seeds.
        interval: 95 % Wilson interval for the effective number of episodes.
        latency_ms, layer_passes: see ``Measured``.
    """

    arm: str
    n: int
    successes: int
    interval: tuple[float, float]
    latency_ms: float | None
    layer_passes: float | None


@dataclass(frozen=True)
class Finding:
    """An effect and what came of it.

    Args:
        effect: what was to hold.
        difference: success rate of the first arm minus that of the second, paired.
        interval: its 95 % interval.
        per_seed: the difference for each training seed.
        p_value: exact permutation test over environment seeds, or groups of questions, before the correction.
        adjusted: the p-value after Holm's correction; None for effects that are not tested.
        ratio: cost of the first arm divided by that of the second; None for effects on success.
        verdict: see the module.
    """

    effect: Effect
    difference: float
    interval: tuple[float, float]
    per_seed: tuple[float, ...]
    p_value: float
    adjusted: float | None
    ratio: float | None
    verdict: Verdict


def arm_row(name: str, measured: Measured) -> ArmRow:
    """Count an arm's successes."""
    clusters = list(measured.outcomes.values())
    n, successes = sum(map(len, clusters)), sum(map(sum, clusters))
    found = wilson(successes, n, effective=effective_size(clusters))
    return ArmRow(name, n, successes, (found.low, found.high), measured.latency_ms, measured.layer_passes)


def findings(claim: Claim, measured: Mapping[str, Measured]) -> tuple[Finding, ...]:
    """Compare the arms.

    Raises:
        DataError: two arms were not measured on the same seeds.
    """
    found = [_finding(effect, measured[effect.first], measured[effect.second]) for effect in claim.effects]
    tested = [number for number, finding in enumerate(found) if finding.effect.direction == "more"]
    for number, adjusted in zip(tested, holm([found[number].p_value for number in tested]), strict=True):
        verdict = _judge(found[number].per_seed, adjusted)
        found[number] = replace(found[number], adjusted=adjusted, verdict=verdict)
    return tuple(found)


def overall(found: Sequence[Finding]) -> Verdict:
    """The verdict on the claim."""
    verdicts = {finding.verdict for finding in found}
    if "refuted" in verdicts:
        return "refuted"
    return "held" if verdicts == {"held"} else "not seen"


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values after Holm's step-down correction (1979): the k-th smallest of m, from k = 0, times m − k, made monotonic."""
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def _finding(effect: Effect, first: Measured, second: Measured) -> Finding:
    """The effect before the correction, with the verdict for those that need none."""
    keys = list(first.outcomes)
    sizes = [{key: len(values) for key, values in one.outcomes.items()} for one in (first, second)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"'{effect.first}' and '{effect.second}' were not measured on the same seeds, so they cannot be paired. "
            "Measure them again in an empty --out."
        )
    pairs = {key: list(zip(first.outcomes[key], second.outcomes[key], strict=True)) for key in keys}
    table = PairedOutcomes.of([b for key in keys for _, b in pairs[key]], [a for key in keys for a, _ in pairs[key]])
    differences = {key: [int(a) - int(b) for a, b in pairs[key]] for key in keys}
    found = paired_difference(table, effective=effective_size(list(differences.values())))
    by_seed = {s: [each for key in keys if key[0] == s for each in differences[key]] for s in sorted({s for s, _ in keys})}
    ratio = _ratio(effect, first, second) if effect.direction == "cheaper" else None
    return Finding(
        effect,
        table.difference,
        (found.low, found.high),
        tuple(float(np.mean(own)) for own in by_seed.values()),
        sign_flip_test(map(sum, differences.values())),
        None,
        ratio,
        _judge_interval(found, effect.margin) if ratio is None else _judge_ratio(ratio),
    )


def _judge(per_seed: Sequence[float], adjusted: float) -> Verdict:
    if adjusted >= LEVEL:
        return "not seen"
    if min(per_seed) > 0:
        return "held"
    return "refuted" if max(per_seed) < 0 else "not seen"


def _judge_interval(interval: Interval, margin: float) -> Verdict:
    if interval.low > -margin:
        return "held"
    return "refuted" if interval.high < -margin else "not seen"


def _judge_ratio(ratio: float) -> Verdict:
    if ratio < CHEAPER:
        return "held"
    return "refuted" if ratio > DEARER else "not seen"


def _ratio(effect: Effect, first: Measured, second: Measured) -> float:
    latency = effect.cost == "latency"
    costs = [one.latency_ms if latency else one.layer_passes for one in (first, second)]
    if costs[0] is None or costs[1] is None:
        raise DataError(f"The {effect.cost} of '{effect.first}' or '{effect.second}' was not measured.")
    return costs[0] / costs[1]
