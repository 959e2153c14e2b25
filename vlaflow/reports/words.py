"""Numbers and names as text, the same on every page and in the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median

from vlaflow.evaluation.results import Evaluation, PairedTest, Results

NOTABLE = 0.05
"""p-value below which a comparison is notable."""


def short(env: str) -> str:
    """The task without its suite and version; "all" stays."""
    return re.sub(r"-v\d+$", "", env.partition("/")[2] or env)


def step_limits(evaluations: Sequence[Evaluation]) -> str:
    """500, or 280 to 520 if the environments differ."""
    limits = sorted({e.max_steps for e in evaluations})
    return f"{limits[0]}" if len(limits) == 1 else f"{limits[0]} to {limits[-1]}"


def percent(interval: tuple[float, float]) -> str:
    """84 to 100 %, with a decimal if the interval is narrow."""
    low, high = (100 * side for side in interval)
    digits = 0 if high - low > 10 else 1
    return f"{low:.{digits}f} to {high:.{digits}f} %"


def signed(difference: float) -> str:
    """A difference of rates in percentage points, with a proper minus sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def rate(successes: int, n: int) -> str:
    """98.3 %, or 100 %."""
    return f"{100 * successes / n:.1f} %".replace(".0 %", " %")


def middle(steps: tuple[int | None, ...]) -> str:
    """The median number of steps over the successes."""
    known = [step for step in steps if step is not None]
    return f"{median(known):g}" if known else "none"


def played(results: Results) -> str:
    """Number of episodes per environment and compute policy, and their seeds."""
    first = results.evaluations[0]
    episodes = f"{first.episodes} episode{'s' if first.episodes > 1 else ''}"
    return f"{episodes} each, {seed_span(first.seeds, first.noise_seeds)}"


def seed_span(seeds: Sequence[int], noise_seeds: Sequence[int]) -> str:
    """The environment seeds, and how often each was played."""
    repetitions, one = len(set(noise_seeds)), min(seeds) == max(seeds)
    return (f"seed {seeds[0]}" if one else f"seeds {min(seeds)} to {max(seeds)}") + (
        f", {repetitions} noise seeds each" if repetitions > 1 else ""
    )


def too_few(results: Results) -> list[str]:
    """What the number of episodes cannot show: a sentence for single environments and one for all together, where needed.

    A difference that is not significant and smaller than the smallest detectable one may be chance, and so may its absence.
    """
    single = [test for test in results.paired if test.env != "all"]
    pooled = [test for test in results.paired if test.env == "all"]
    where = "over all environments" if single else ""
    return [*_too_few(single, "per environment"), *_too_few(pooled, where)]


def _too_few(tests: list[PairedTest], where: str) -> list[str]:
    open_tests = [t for t in tests if t.p_value >= NOTABLE and abs(t.difference) < t.detectable]
    if not open_tests:
        return []
    largest = max(open_tests, key=lambda t: abs(t.difference))
    pairs = largest.both + largest.only_first + largest.only_second + largest.neither
    worth = f" (worth {largest.effective_pairs:.0f} independent ones)" if round(largest.effective_pairs) < pairs else ""
    low, high = (f"{100 * side(t.detectable for t in open_tests):.0f}" for side in (min, max))
    limit = low if low == high else f"{low} to {high}"
    place = f" {where}" if where else ""
    number = f"{pairs} pair{'s' if pairs > 1 else ''}"
    sentence = f"With {number}{place}{worth}, differences below about {limit} points cannot be told from chance"
    if largest.episodes_needed is None:
        return [f"{sentence}."]
    which = f"{largest.second} against {largest.first}" + ("" if largest.env == "all" else f", {short(largest.env)}")
    return [
        f"{sentence}; at least {largest.episodes_needed} episodes{place} would be needed for the "
        f"{100 * abs(largest.difference):.1f} points shown ({which})."
    ]
