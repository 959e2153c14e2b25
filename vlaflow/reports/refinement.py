"""The page of a calibrated refinement: reliability of the confidence, error against the regenerated share, and the rivals."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlaflow.compute.doubt_calibration import RefineCalibration, Rival
from vlaflow.evaluation.refinement_measures import ORACLE, RATER, Drafts
from vlaflow.reports import page
from vlaflow.reports.figure import FAINT, INK, LINES, MARKERS, SERIES, WIDTH, figure
from vlaflow.reports.page import Figure, Table
from vlaflow.versions import version_list

BINS = 10
HEADS = ("rival", "second round", "regenerated", "error", "difference to the first round", "95 % interval", "p50, ms")


def write_page(made: RefineCalibration, drafts: Drafts, file: Path) -> Path:
    """Write one self-contained HTML file.

    Args:
        made: the calibration.
        drafts: the measurement behind it.
        file: the page to write.
    """
    test = made.effect
    figures = [
        Figure(
            shares(made),
            "Mean squared error of the executed actions after regenerating a share of them, chosen by each doubt from the same "
            "first rounds and with the same noise. Bars are 95 % intervals of the difference to the first round. The oracle "
            "knows the demonstration: no doubt can do better with this second round.",
        )
    ]
    if drafts.label_NL.size:
        figures.insert(
            0,
            Figure(
                reliability(drafts),
                "Reliability: executed actions in ten bins of equally many by confidence; the mean confidence against the mean "
                "of the labels that the rater should have given. On the line, it is right on average.",
            ),
        )
    tiles = [
        (f"{made.threshold:.3g}", f"threshold of the {made.doubt}"),
        (f"{100 * test.share:.0f} %", f"of {test.actions} executed actions of other episodes are regenerated"),
        (f"{test.error:.4f}", f"their mean squared error, {test.draft_error:.4f} before"),
    ]
    if test.above is not None:
        tiles.append((f"{100 * test.above:.1f} %", "of the chunks keep an action that is worse than allowed"))
    facts = {
        "checkpoint": made.checkpoint,
        "data set": made.dataset,
        "first round": made.first,
        "second round": f"{made.sampling}, from clock {made.clock:g}",
        "executed actions": str(made.n_action_steps),
        "command": made.command,
        "versions": version_list(made.versions),
    }
    return page.write(
        file,
        "refinement.html",
        title=f"Refinement {file.stem}",
        tile_entries=tiles,
        figures=figures,
        knowledge_entry=knowledge(made),
        rivals_entry=Table(HEADS, [_cells(each) for each in made.rivals], (0, 1), dense=True),
        fact_entries=facts,
    )


def words(made: RefineCalibration) -> str:
    """The threshold, what the doubts know, and the rivals, as text."""
    test = made.effect
    lines = [
        f"Threshold {made.threshold:.4g} of the {made.doubt}, from {made.actions} executed actions; on {test.actions} of other "
        f"episodes it regenerates {100 * test.share:.1f} % (error {test.draft_error:.4f} before, {test.error:.4f} after).",
    ]
    if test.above is not None:
        lines.append(f"{100 * test.above:.1f} % of the other chunks keep an action that is worse than allowed.")
    lines += ["", *_aligned(knowledge(made)), "", *_aligned(Table(HEADS, [_cells(each) for each in made.rivals], (0, 1)))]
    return "\n".join(lines)


def knowledge(made: RefineCalibration) -> Table:
    """Rank correlations and areas under the curve."""
    heads = ("doubt", "rank correlation within a chunk", "over all actions", "AUC, worst quarter")
    return Table(heads, [(k.doubt, f"{k.within:.3f}", f"{k.overall:.3f}", f"{k.auc:.3f}") for k in made.knowledge])


def shares(made: RefineCalibration) -> str:
    """Error against the regenerated share, a line per doubt."""
    names = [name for name in dict.fromkeys(each.name for each in made.rivals) if any(k.doubt == name for k in made.knowledge)]
    start = made.rivals[0]
    with figure(WIDTH, 2.8) as (_, axis, done):
        axis.axhline(start.error, color=FAINT, lw=1)
        for number, name in enumerate([*names, ORACLE]):
            own = [start, *(each for each in made.rivals if each.name == name)]
            low, high = (
                [abs(bound - each.difference) for each, bound in zip(own, bounds, strict=True)]
                for bounds in ([each.low for each in own], [each.high for each in own])
            )
            axis.errorbar(
                [100 * each.share for each in own],
                [each.error for each in own],
                [low, high],
                color=SERIES[number % len(SERIES)],
                marker=MARKERS[number % len(MARKERS)],
                ls=LINES[number % len(LINES)],
                ms=4,
                lw=1.4,
                label=name,
            )
        axis.set(xlabel="regenerated, % of the executed actions", ylabel="mean squared error")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
        return done()


def reliability(drafts: Drafts) -> str:
    """Mean confidence against mean label, in bins."""
    confidence_M, label_M = -drafts.score_NL[RATER][drafts.counts_NL], drafts.label_NL[drafts.counts_NL]
    bins = np.array_split(np.argsort(confidence_M, kind="stable"), BINS)
    points = [(float(confidence_M[own].mean()), float(label_M[own].mean())) for own in bins if len(own)]
    with figure(WIDTH, 2.8) as (_, axis, done):
        axis.plot([0, 1], [0, 1], color=FAINT, lw=1)
        axis.plot(*zip(*points, strict=True), "-o", color=INK, ms=4, lw=1.4)
        axis.set(xlabel="mean confidence", ylabel="mean label", xlim=(0, 1), ylim=(0, 1))
        return done()


def _cells(each: Rival) -> tuple[str, ...]:
    interval = f"{each.low:+.4f} to {each.high:+.4f}" if each.high != each.low else ""
    p50 = "" if each.p50 is None else f"{each.p50:.1f}"
    return (
        each.name,
        each.settings,
        f"{100 * each.share:.1f} %",
        f"{each.error:.4f}",
        f"{each.difference:+.4f}",
        interval,
        p50,
    )


def _aligned(found: Table) -> list[str]:
    """The table as lines of text."""
    rows = [tuple(map(str, row)) for row in (found.heads, *found.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in found.text else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
