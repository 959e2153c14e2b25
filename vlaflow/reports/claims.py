"""The page of a claim: verdict, the arms' success with intervals, the effects, and where the episodes are."""

from __future__ import annotations

from pathlib import Path

from vlaflow.claims.base import Claim
from vlaflow.claims.plan import Places
from vlaflow.claims.row import Row
from vlaflow.claims.verdict import ArmRow, Finding
from vlaflow.reports import page
from vlaflow.reports.figure import INK, SERIES, WIDTH, figure
from vlaflow.reports.page import Figure, Table
from vlaflow.reports.words import percent, short, signed
from vlaflow.versions import version_list

DIRECTIONS = {"more": "more successes than", "no fewer": "no fewer successes than", "cheaper": "cheaper than"}


def write_page(claim: Claim, row: Row, places: Places) -> Path:
    """Write one self-contained HTML file that links the evaluations of its arms."""
    seeds = row.size.seeds
    reports = {
        f"{name}, training seed {seed}": file.relative_to(places.out)
        for name in claim.order()
        for seed in seeds
        if (file := places.results(claim, name, seed) / "report.html").exists()
    }
    return page.write(
        places.page(claim),
        "claim.html",
        title=f"{claim.name}: {row.verdict}",
        system=claim.system,
        statement=claim.statement,
        published=claim.published,
        remark=claim.remark,
        quick=row.size.quick,
        figures=[Figure(success(row), "Success rate of every arm; bars are 95 % Wilson intervals.")],
        arms=Table(("arm", "success", "95 % interval", "p50 ms", "layers"), [_arm(arm) for arm in row.arms]),
        effects=Table(
            ("effect", "verdict", "difference", "95 % interval", "by training seed", "p", "cost"),
            [_finding(finding) for finding in row.findings],
            (0, 1),
            dense=True,
        ),
        reports=reports,
        commands=row.commands,
        fact_entries={
            "benchmark": row.benchmark,
            "tasks": ", ".join(map(short, row.envs)),
            "training seeds": ", ".join(map(str, seeds)),
            "episodes": f"{row.arms[0].n} per arm",
            "hours": f"{row.hours:.1f}",
            "machine": row.machine,
            "versions": version_list(row.versions),
        },
    )


def success(row: Row) -> str:
    """Success rate by arm, with intervals."""
    with figure(WIDTH, 0.34 * len(row.arms) + 0.6) as (_, axis, done):
        for number, arm in enumerate(row.arms):
            rate, (low, high) = 100 * arm.successes / arm.n, (100 * side for side in arm.interval)
            axis.barh(number, rate, color=SERIES[0], height=0.6)
            axis.plot([low, high], [number, number], color=INK, lw=1.2)
        axis.set_yticks(range(len(row.arms)), [arm.arm for arm in row.arms])
        axis.invert_yaxis()
        axis.set(xlim=(0, 100), xlabel="success, %")
        return done()


def in_words(finding: Finding) -> str:
    """An effect as a sentence."""
    one = finding.effect
    claim = f"{one.first}: {DIRECTIONS[one.direction]} {one.second}"
    if finding.ratio is not None:
        return f"{claim}: {finding.ratio:.2f} times its {one.cost}: {finding.verdict}"
    low, high = finding.interval
    margin = f", margin {100 * one.margin:.0f} points"
    tested = margin if finding.adjusted is None else f", p = {finding.adjusted:.2g} (Holm)"
    return f"{claim}: {signed(finding.difference)} points [{signed(low)}, {signed(high)}]{tested}: {finding.verdict}"


def _arm(arm: ArmRow) -> list[str]:
    cost = [f"{value:.1f}" if value is not None else "" for value in (arm.latency_ms, arm.layer_passes)]
    return [arm.arm, f"{arm.successes}/{arm.n}", percent(arm.interval), *cost]


def _finding(finding: Finding) -> list[str]:
    one = finding.effect
    low, high = finding.interval
    name = f"{one.first}: {DIRECTIONS[one.direction]} {one.second}"
    if finding.ratio is not None:
        return [f"{name} ({one.cost})", finding.verdict, "", "", "", "", f"{finding.ratio:.2f} ×"]
    p_value = f"{finding.adjusted:.2g}" if finding.adjusted is not None else ""
    by_seed = ", ".join(map(signed, finding.per_seed))
    return [name, finding.verdict, signed(finding.difference), f"{signed(low)} to {signed(high)}", by_seed, p_value, ""]
