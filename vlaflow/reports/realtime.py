"""The page of a real-time comparison: success and jerk against delay, what was executed, and the numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.evaluation.realtime import Trace
from vlaflow.evaluation.realtime_results import Cell, Comparison, RealtimeResults
from vlaflow.reports import page
from vlaflow.reports.figure import FAINT, INK, LINES, MARKERS, SERIES, WIDTH, figure
from vlaflow.reports.page import Figure, Table
from vlaflow.reports.words import NOTABLE, seed_span, short
from vlaflow.versions import version_list

WORDS = {
    "wait": "wait (synchronous)",
    "switch": "switch (naive asynchronous)",
    "ensemble": "ensemble (temporal ensembling)",
    "commit": "commit (real-time chunking)",
}


def write_page(found: RealtimeResults, file: Path) -> Path:
    """Write one self-contained HTML file."""
    figures = [
        Figure(success(found), "Success rate against the delay of replies; bars are 95 % Wilson intervals."),
        Figure(
            jerk(found),
            "Mean second difference of the commanded motion at boundaries between chunks (bars: 95 % intervals over "
            "environment seeds), and elsewhere (faint).",
        ),
    ]
    if drawn := executed(found):
        figures.append(drawn)
    guided = ", continued by guidance" if found.guided else ""
    episodes = len(found.seeds) * len(found.noise_seeds)
    notable = [test for test in found.comparisons if min(test.success_p, test.jerk_p) < NOTABLE]
    return page.write(
        file,
        "realtime.html",
        title=f"{found.system} with {found.compute}{guided} in real time",
        protocol=f"{episodes} episode{'s' if episodes > 1 else ''} ({seed_span(found.seeds, found.noise_seeds)}) of each of "
        f"{', '.join(map(short, found.envs))}, up to {found.max_steps} control steps at "
        f"{found.rate_hz:g} Hz; the next chunk is requested after {found.n_action_steps} actions; {found.compute_settings}; "
        f"jitter up to {found.jitter_ms:g} ms, fade over {found.fade} actions.",
        figures=figures,
        cells=Table(CELLS, [_row(cell) for cell in found.cells], (1,), dense=True),
        paired=Table(PAIRS, [_pair(test) for test in found.comparisons], (1, 2)),
        paired_summary=f"{len(found.comparisons)} paired comparisons: {len(notable) or 'none'} with p below {NOTABLE:g}",
        notable=bool(notable),
        command=found.command,
        fact_entries={
            "checkpoint": f"{found.checkpoint}, content {found.fingerprint[:12]}, computed in {found.dtype}",
            "machine": found.machine,
            "versions": version_list(found.versions),
        },
    )


def success(found: RealtimeResults) -> str:
    """Success rate against delay, one line per mode."""
    with figure(WIDTH, 2.6) as (_, axis, done):
        for number, cells in enumerate(_by_mode(found).values()):
            at = _places(cells, number)
            rate = np.array([100 * c.successes / c.episodes for c in cells])
            bars = np.array([[r - 100 * c.interval[0], 100 * c.interval[1] - r] for r, c in zip(rate, cells, strict=True)]).T
            _line(axis, at, rate, bars.clip(0), number)
        axis.set(ylim=(0, 102), ylabel="success, %", xlabel="delay of a reply, ms")
        _legend(axis, _by_mode(found))
        return done()


def jerk(found: RealtimeResults) -> str:
    """Jerk at boundaries against delay, one line per mode."""
    with figure(WIDTH, 2.6) as (_, axis, done):
        for number, cells in enumerate(_by_mode(found).values()):
            known = [c for c in cells if c.boundary_jerk]
            at, value = _places(known, number), np.array([c.boundary_jerk for c in known])
            if known:
                bars = np.stack([value[:, 0] - value[:, 1], value[:, 2] - value[:, 0]]).clip(0)
                _line(axis, at, value[:, 0], bars, number)
            inner = [c for c in cells if c.inner_jerk]
            axis.plot(_places(inner, number), [c.inner_jerk[0] for c in inner if c.inner_jerk], color=FAINT, lw=0.8)
        axis.set(ylabel="second difference of the motion,\naction units per step²", xlabel="delay of a reply, ms")
        axis.set_ylim(bottom=0)
        _legend(axis, _by_mode(found))
        return done()


def executed(found: RealtimeResults) -> Figure | None:
    """The actions of the first seed, one panel per mode, at the upper median of the delays."""
    delays = sorted({c.delay_ms for c in found.cells})
    delay = delays[len(delays) // 2]
    traces = {e.mode: e.trace for e in found.episodes if e.trace and e.delay_ms == delay and e.env == found.envs[0]}
    if not traces:
        return None
    with figure(WIDTH, 1.15 * len(traces) + 0.5, len(traces), 1, sharex=True, sharey=True) as (_, axes, done):
        for axis, (mode, trace) in zip(np.atleast_1d(axes), traces.items(), strict=True):
            _panel(axis, trace, mode)
        np.atleast_1d(axes)[-1].set_xlabel("control step")
        drawn = done()
    return Figure(
        drawn,
        f"The first seed of {short(found.envs[0])} at {delay:g} ms, as executed: one line per action dimension, a vertical "
        "line where another chunk took over, a band where the robot was idle.",
    )


def _panel(axis: Any, trace: Trace, mode: str) -> None:
    values = np.array(trace.actions)
    for dimension in range(values.shape[1]):
        axis.plot(values[:, dimension], color=SERIES[dimension % 5], ls=LINES[dimension % 5], lw=1.1)
    for step in trace.boundaries:
        axis.axvline(step, color=INK, lw=0.5)
    for step in trace.idle:
        axis.axvspan(step - 0.5, step + 0.5, color=FAINT, alpha=0.25, lw=0)
    axis.set_title(WORDS[mode], loc="left")


def _by_mode(found: RealtimeResults) -> dict[str, list[Cell]]:
    return {mode: [c for c in found.cells if c.mode == mode] for mode in dict.fromkeys(c.mode for c in found.cells)}


def _places(cells: list[Cell], number: int) -> np.ndarray:
    """Delays, slightly shifted so that bars do not overlap."""
    return np.array([c.delay_ms for c in cells]) + 3.0 * number


def _line(axis: Any, at: np.ndarray, value: np.ndarray, bars: np.ndarray, number: int) -> None:
    axis.errorbar(at, value, bars, color=SERIES[number], marker=MARKERS[number], ls=LINES[number], lw=1.6, ms=5)


def _legend(axis: Any, modes: Iterable[str]) -> None:
    marks = [axis.plot([], [], MARKERS[n], color=SERIES[n], ls=LINES[n], lw=1.6, ms=5)[0] for n, _ in enumerate(modes)]
    axis.legend(marks, [WORDS[mode] for mode in modes], loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


CELLS = (
    "delay, ms",
    "hand-over",
    "success",
    "by task",
    "steps to success",
    "jerk at boundaries",
    "jerk elsewhere",
    "idle",
    "late replies",
)
PAIRS = ("delay, ms", "task", "compared", "success, points", "p", "jerk", "smoother : rougher", "p")


def _row(cell: Cell) -> tuple[str, ...]:
    def mean(value: tuple[float, float, float] | None) -> str:
        return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]" if value else "none"

    return (
        f"{cell.delay_ms:g}",
        cell.mode,
        f"{cell.successes}/{cell.episodes} [{100 * cell.interval[0]:.0f}, {100 * cell.interval[1]:.0f}] %",
        " + ".join(str(n) for n in cell.per_env.values()),
        f"{cell.steps:g}" if cell.steps else "none",
        mean(cell.boundary_jerk),
        mean(cell.inner_jerk),
        f"{100 * cell.idle_share:.0f} %",
        f"{100 * cell.late_share:.0f} %",
    )


def _pair(test: Comparison) -> tuple[str, ...]:
    difference, low, high = (100 * value for value in test.success)
    return (
        f"{test.delay_ms:g}",
        short(test.env),
        f"{test.second} − {test.first}",
        f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]",
        f"{test.success_p:.2g}",
        "none" if test.jerk is None else f"{test.jerk:+.3f}",
        f"{test.smoother} : {test.rougher}",
        f"{test.jerk_p:.2g}",
    )
