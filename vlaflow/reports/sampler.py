"""The page of a calibrated sampler: candidates by latency and score, the chosen one, and every measure in a table."""

from __future__ import annotations

from math import exp, expm1
from pathlib import Path

from vlaflow.compute.sampler_choice import FAILURES, Candidate, SamplerCalibration
from vlaflow.evaluation.sampler_measures import MEASURES
from vlaflow.reports import page
from vlaflow.reports.figure import FAINT, INK, SERIES, WIDTH, figure
from vlaflow.reports.page import Figure, Table
from vlaflow.versions import version_list

PLAUSIBLE = "the geometric mean of the executed actions' squared distances to the demonstration and to any demonstration"


def write_page(made: SamplerCalibration, file: Path) -> Path:
    """Write one self-contained HTML file."""
    chosen = made.chosen
    tiles = [
        (chosen.compute, "chosen: what --compute auto runs"),
        (f"{chosen.p50:.1f} ms", f"per chunk at p50, {chosen.p99:.1f} at p99, on {made.device} with {made.threads} thread(s)"),
        (_score(made, chosen), _criterion(made)),
    ]
    caption = (
        f"Every candidate: milliseconds per chunk (p50) against {_criterion(made)}. The line is the Pareto front: no other "
        "candidate is both faster and better. Bars are one standard error of the paired difference from the best; the diamond "
        f"is the chosen one, the cheapest {_near(made)}."
    )
    facts = {
        "checkpoint": made.checkpoint,
        "data set": made.dataset,
        "held-out frames": str(made.frames),
        "draws in two groups": f"on {100 * made.two_groups:.0f} % of the frames",
        **(
            {
                "environments": ", ".join(made.envs),
                "seeds": f"{made.first_seed} to {made.first_seed + made.seeds - 1}; no evaluation may use them",
            }
            if made.envs
            else {}
        ),
        "budget": "none" if made.budget_ms is None else f"{made.budget_ms:g} ms at p99",
        "machine": made.machine,
        "command": made.command,
        "versions": version_list(made.versions),
    }
    return page.write(
        file,
        "sampler.html",
        title=f"Sampler of {file.parent.parent.name}",
        tile_entries=tiles,
        figures=(Figure(pareto(made), caption),),
        table_entry=candidates(made),
        meanings=[(name, MEASURES[name]) for name in MEASURES if any(name in each.measures for each in made.candidates)],
        fact_entries=facts,
    )


def words(made: SamplerCalibration) -> str:
    """The choice in a few sentences."""
    chosen, shown = made.chosen, [each for each in made.candidates if not _remark(made, each)]
    best = min(shown, key=lambda each: (each.score, each.layer_passes))
    measured = f"{made.seeds} seeds each of {', '.join(made.envs)}" if made.envs else f"{made.frames} held-out frames"
    lines = [
        f"{len(made.candidates)} candidates on {measured}, by {_criterion(made)}.",
        f"Chosen: {chosen.compute}, {_score(made, chosen)}, {chosen.p50:.1f} ms per chunk at p50 and {chosen.p99:.1f} at p99.",
    ]
    if best.compute != chosen.compute:
        lines.append(f"The best is {best.compute}, {_score(made, best)}, {best.p50:.1f} ms; which is not clearly better.")
    return "\n".join(lines)


def candidates(made: SamplerCalibration) -> Table:
    """A row per candidate, the best score first."""
    measures = [name for name in MEASURES if any(name in each.measures for each in made.candidates)]
    head = ("compute", "p50, ms", "p99, ms", "score", "behind the best", *measures, "remark")
    rows = []
    for each in sorted(made.candidates, key=lambda each: (bool(each.reason), each.score, each.p50)):
        behind = f"{each.behind:.4g} ± {each.standard_error:.2g}"
        values = [f"{each.measures[name]:.4g}" if name in each.measures else "" for name in measures]
        remark = _remark(made, each) or ("chosen" if each.compute == made.choice else "")
        rows.append((each.compute, f"{each.p50:.1f}", f"{each.p99:.1f}", _score(made, each), behind, *values, remark))
    return Table(head, rows, dense=True)


def front(found: tuple[Candidate, ...]) -> list[Candidate]:
    """Candidates that no other one beats in both p50 and score, the fastest first."""
    kept: list[Candidate] = []
    for each in sorted(found, key=lambda each: (each.p50, each.score)):
        if not kept or each.score < kept[-1].score:
            kept.append(each)
    return kept


def pareto(made: SamplerCalibration) -> str:
    """Score against latency."""
    scale = 100 if made.criterion == FAILURES else 1
    shown = tuple(each for each in made.candidates if not each.reason)
    best = front(shown)
    with figure(WIDTH, 3.2) as (_, axis, done):
        axis.plot([each.p50 for each in best], [scale * each.score for each in best], "-", color=FAINT, lw=1.2)
        for each in shown:
            low, high = (scale * abs(_moved(made, each, sign) - each.score) for sign in (-1, 1))
            axis.errorbar(each.p50, scale * each.score, [[low], [high]], color=SERIES[0], fmt="o", ms=4, lw=0.8)
        for each in best:
            axis.annotate(each.compute, (each.p50, scale * each.score), (4, 4), textcoords="offset points", color=INK)
        axis.plot(made.chosen.p50, scale * made.chosen.score, "D", color=INK, ms=7)
        axis.set(
            xscale="log",
            xlabel="milliseconds per chunk, p50",
            ylabel="episodes that failed, %" if made.criterion == FAILURES else made.criterion,
        )
        return done()


def _moved(made: SamplerCalibration, each: Candidate, sign: int) -> float:
    """The score one standard error away; for scores on frames, the standard error is that of their logarithm."""
    if made.criterion == FAILURES:
        return each.score + sign * each.standard_error
    return each.score * exp(sign * each.standard_error)


def _near(made: SamplerCalibration) -> str:
    within = f" or {100 * expm1(made.tolerance):.0f} % of the score" if made.tolerance else ""
    return f"within one standard error{within} of the best" + (" that fits the budget" if made.budget_ms is not None else "")


def _remark(made: SamplerCalibration, each: Candidate) -> str:
    """Why a candidate could not be chosen; empty if it could."""
    slow = made.budget_ms is not None and each.p99 > made.budget_ms
    return each.reason or (f"slower than {made.budget_ms:g} ms at p99" if slow else "")


def _criterion(made: SamplerCalibration) -> str:
    return "the share of episodes that failed" if made.criterion == FAILURES else PLAUSIBLE


def _score(made: SamplerCalibration, each: Candidate) -> str:
    return f"{each.successes}/{each.episodes}" if each.episodes else f"{each.score:.4f}"
