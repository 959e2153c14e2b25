"""Numbers and names as text, the same on every page and in the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlaflow.evaluation.results import Evaluation

NOTABLE = 0.05
"""p-value below which a comparison is notable."""


def short(env: str) -> str:
    """The task without its suite and version."""
    return re.sub(r"-v\d+$", "", env.partition("/")[2])


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
    known = sorted(step for step in steps if step is not None)
    return f"{known[len(known) // 2]}" if known else "none"
