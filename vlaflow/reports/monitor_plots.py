"""The part of an evaluation's page about confidence as a monitor: plot and table of how well it foretells failures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlaflow.evaluation.monitor import SIGNALS, Foretold, first_notice, foretold
from vlaflow.evaluation.results import Results
from vlaflow.reports.figure import FAINT, LINES, MARKERS, SERIES, WIDTH, figure
from vlaflow.reports.page import Figure, Table
from vlaflow.reports.words import short

Curve = tuple[str, Sequence[Foretold]]


def monitor(results: Results) -> dict[str, Any] | None:
    """Text, plot and table; None where no episodes have a signal and both outcomes."""
    curves: list[Curve] = []
    for e in results.evaluations:
        for signal in SIGNALS:
            points = foretold(e.per_episode, e.n_action_steps, signal)
            if points:
                curves.append((f"{short(e.env)}, {e.compute}, {signal}", points))
    if not curves:
        return None
    text = (
        "Area under the ROC curve with which the mean confidence (or spread) of the chunks so far tells episodes that will "
        "fail from those that will succeed, among the episodes that are still running; 0.5 is chance. Intervals are 95 % "
        "(Newcombe), not corrected for looking at several moments."
    )
    return {"text": text, "figure": Figure(areas(curves)), "table": notices(curves)}


def areas(curves: Sequence[Curve]) -> str:
    """Area under the curve over the step."""
    with figure(WIDTH, 2.8) as (_, axis, done):
        axis.axhline(0.5, color=FAINT, lw=1)
        for number, (name, points) in enumerate(curves):
            colour, steps = SERIES[number % len(SERIES)], [each.step for each in points]
            style = {"marker": MARKERS[number % len(MARKERS)], "ls": LINES[number % len(LINES)], "ms": 3, "lw": 1.4}
            axis.plot(steps, [each.auc for each in points], color=colour, label=name, **style)
            axis.fill_between(
                steps, [each.low for each in points], [each.high for each in points], color=colour, alpha=0.12, lw=0
            )
        axis.set(xlabel="step", ylabel="area under the curve", ylim=(0, 1))
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=1)
        return done()


def notices(curves: Sequence[Curve]) -> Table:
    """The first chunk, and the moment from which the interval lies above chance."""
    rows = []
    for name, points in curves:
        notice = first_notice(points)
        rows.append((name, _cell(points[0]), "never" if notice is None else _cell(notice), _cell(max(points, key=_area))))
    return Table(("signal", "first chunk", "above chance from", "best"), rows)


def _area(each: Foretold) -> float:
    return each.auc


def _cell(each: Foretold) -> tuple[str, str]:
    found = f"step {each.step}: {each.auc:.2f}"
    return found, f"[{each.low:.2f}, {each.high:.2f}], {each.failing} of {each.running} fail"
