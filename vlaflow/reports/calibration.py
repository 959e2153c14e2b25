"""The page of a calibration: discrepancies with their thresholds, exit shares against the target, layers against deviation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlaflow.compute.calibration import Calibration
from vlaflow.compute.thresholds import ExitMeasurements, exit_shares, filtered_quantiles, taken
from vlaflow.reports import page
from vlaflow.reports.figure import FAINT, INK, SERIES, WIDTH, figure
from vlaflow.reports.page import Figure
from vlaflow.versions import version_list

BUDGETS = tuple(np.geomspace(0.02, 4, 25).tolist())


def write_page(made: Calibration, table: ExitMeasurements, file: Path) -> Path:
    """Write one self-contained HTML file.

    Args:
        made: the calibration.
        table: the measurement behind it.
        file: the page to write.
    """
    test, plan = made.effect, made.plan
    figures = (
        Figure(
            discrepancies(made, table),
            f"How far each depth's chunk is from the one before it ({plan.metric}), on the {made.samples} frames that the "
            "thresholds were chosen on. A chunk exits at the first depth with a discrepancy below its threshold (vertical).",
        ),
        Figure(shares(made), f"Share of the chunks that exit at each depth, on {test.samples} other frames."),
        Figure(
            trade_off(made, table),
            "Mean depth against the mean largest difference from the full-depth chunk (standard deviations of the actions), on "
            "the other frames, for exponential targets of different budgets. The diamond is this calibration.",
        ),
    )
    tiles = [
        (f"{test.layers:.2f} of {plan.exits[-1]}", "layers on average"),
        (f"{test.nfe:.1f}", "network evaluations per chunk on average"),
        (f"{test.error:.4f}", f"distance to the demonstrations, {test.full_error:.4f} at full depth"),
    ]
    if test.above is not None:
        tiles.append((f"{100 * test.above:.1f} %", "of the chunks above the largest allowed deviation"))
    facts = {
        "checkpoint": made.checkpoint,
        "data set": made.dataset,
        "exits at depths": ", ".join(map(str, plan.depths)),
        "solver steps at each": str(plan.sampling),
        "warm start": plan.warm_start + (f" from clock {plan.restart:g}" if plan.warm_start == "renoise" else ""),
        "command": made.command,
        "versions": version_list(made.versions),
    }
    title = f"Calibration {file.stem}"
    return page.write(file, "calibration.html", title=title, tile_entries=tiles, figures=figures, fact_entries=facts)


def discrepancies(made: Calibration, table: ExitMeasurements) -> str:
    """A cumulative curve for each exit but the last, with its threshold."""
    plan, own = made.plan, table.discrepancy_NK[table.choose_N]
    floor = max(float(own[own > 0].min()), 1e-9) if (own > 0).any() else 1e-9
    with figure(WIDTH, 2.6) as (_, axis, done):
        for number, depth in enumerate(plan.exits[:-1]):
            colour, x = SERIES[number % 5], np.sort(np.maximum(own[:, number], floor))
            axis.step(x, 100 * np.arange(1, len(x) + 1) / len(x), color=colour, lw=1.6, label=f"depth {depth}")
            threshold = made.thresholds[number]
            if threshold is not None:
                axis.axvline(max(threshold, floor), color=colour, lw=1, ls="--")
        axis.set(xscale="log", xlabel=f"discrepancy ({plan.metric})", ylabel="% of the frames", ylim=(0, 100))
        if axis.lines:  # with two depths every chunk is compared at the last one
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
        return done()


def shares(made: Calibration) -> str:
    """Bars of the measured shares, and the target shares if there are any."""
    places = np.arange(len(made.plan.exits))
    with figure(WIDTH, 2.2) as (_, axis, done):
        axis.bar(places, [100 * s for s in made.effect.shares], 0.6, color=SERIES[0], label="measured")
        if target := [100 * s for s in made.target.shares]:
            axis.plot(places, target, "D", color=SERIES[1], ms=6, label="target", clip_on=False)
        axis.set_xticks(places, [f"{depth}" for depth in made.plan.exits])
        axis.set(xlabel="depth", ylabel="% of the chunks", ylim=(0, 100))
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        return done()


def trade_off(made: Calibration, table: ExitMeasurements) -> str:
    """Mean depth against mean deviation over all budgets."""
    own, fresh, depth_K = table.choose_N, ~table.choose_N, np.asarray(made.plan.exits)
    rows, points = np.arange(int(fresh.sum())), []
    for budget in BUDGETS:
        share_K = exit_shares("exponential", budget, len(depth_K))
        exit_N = taken(table.discrepancy_NK[fresh], filtered_quantiles(table.discrepancy_NK[own], share_K))
        points.append((depth_K[exit_N].mean(), table.largest_NK[fresh][rows, exit_N].mean()))
    x, y = zip(*sorted(points), strict=True)
    with figure(WIDTH, 2.6) as (_, axis, done):
        axis.plot(x, y, "-o", color=FAINT, ms=3, lw=1.2)
        axis.plot(made.effect.layers, made.effect.deviation, "D", color=INK, ms=7)
        axis.set(xlabel="mean depth, layers", ylabel="largest difference", ylim=(0, None), xlim=(0, depth_K[-1] * 1.03))
        return done()
