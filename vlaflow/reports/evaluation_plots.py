"""The plots of an evaluation's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlaflow.evaluation.groups import GroupRate
from vlaflow.evaluation.latency import PARTS, Latency
from vlaflow.evaluation.results import Evaluation, Minutes, Overall, Results
from vlaflow.evaluation.videos import EpisodeVideo, VideoChunk
from vlaflow.reports.figure import FAINT, INK, LINES, MARKERS, PAPER, SERIES, WIDTH, figure
from vlaflow.reports.words import short
from vlaflow.simulators.base import published_groups

PART_NAMES = {
    "prefix": "prefix",
    "first": "solver steps",
    "refine_deterministic": "deterministic steps",
    "rater": "rater",
    "refine": "second round",
    "other": "other",
}
LEGEND_COLUMNS = 3
"""Largest number of columns of a legend above a plot; a wider one would leave no room for the plot."""


def success(results: Results) -> str:
    """Success rate with its interval, one row per environment or group of them, one marker per compute policy."""
    computes = results.computes
    rows = [*places(results), *(["all"] if len(results.envs) > 1 else [])]
    columns = min(len(computes), LEGEND_COLUMNS)
    height = 0.55 + 0.2 * -(-len(computes) // columns) + (0.2 * len(computes) + 0.22) * len(rows)
    with figure(WIDTH, height) as (_, axis, done):
        for c, compute in enumerate(computes):
            for r, env in enumerate(rows):
                entry = _rate(results, env, compute)
                low, high = entry.interval
                y = r * (len(computes) + 1) + c
                axis.plot([100 * low, 100 * high], [y, y], color=SERIES[c % 5], lw=2, solid_capstyle="butt")
                label = compute if r == 0 else None
                rate = 100 * entry.successes / entry.episodes
                axis.plot(rate, y, MARKERS[c % 5], color=SERIES[c % 5], ms=6, label=label, clip_on=False)
        middle = (len(computes) - 1) / 2
        axis.set_yticks([r * (len(computes) + 1) + middle for r in range(len(rows))], [short(env) for env in rows])
        axis.set(xlim=(0, 100), xlabel="success, % of episodes (bar: 95 % Wilson interval)")
        axis.set_ylim(len(rows) * (len(computes) + 1) - 1.3, -0.8)
        axis.tick_params(axis="y", length=0, pad=8)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)
        return done()


def places(results: Results) -> dict[str, tuple[str, ...]]:
    """Environments by what is plotted as one: itself, or its group if all groups that its suite publishes were evaluated.

    Fifty environments would make a plot of many pages; the table has them.
    """
    grouped = {
        f"{mean.suite}/{group}": envs
        for mean in results.overall[0].by_group
        for group, envs in published_groups(mean.suite).items()
    }
    inside = {env for envs in grouped.values() for env in envs}
    return {env: (env,) for env in results.envs if env not in inside} | grouped


def _rate(results: Results, place: str, compute: str) -> Evaluation | GroupRate | Overall:
    overall = next(o for o in results.overall if o.compute == compute)
    groups = {f"{mean.suite}/{rate.group}": rate for mean in overall.by_group for rate in mean.groups}
    if place == "all":
        return overall
    return groups[place] if place in groups else results.of(place, compute)


def first_success(results: Results) -> str:
    """Share of the episodes that have succeeded by each step, per environment or group of them."""
    panels = places(results)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with figure(WIDTH, 2 * rows + 0.4, rows, columns, sharey=True) as (_, axes, done):
        grid = np.atleast_1d(axes).ravel()
        for spare in grid[len(panels) :]:
            spare.set_visible(False)
        for (place, envs), axis in zip(panels.items(), grid, strict=False):
            entries = [results.of(env, compute) for env in envs for compute in results.computes]
            longest = max(entry.max_steps for entry in entries)
            for c, compute in enumerate(results.computes):
                firsts = [step for entry in entries if entry.compute == compute for step in entry.first_success_steps]
                steps = sorted(step for step in firsts if step is not None)
                x = [0, *steps, longest]
                y = [0, *(100 * (i + 1) / len(firsts) for i in range(len(steps))), 100 * len(steps) / len(firsts)]
                axis.step(x, y, where="post", color=SERIES[c % 5], ls=LINES[c % 5], lw=1.8, label=compute, clip_on=False)
            for limit in {w.max_steps for entry in entries for w in entry.within if w.max_steps < longest}:
                axis.axvline(limit, color=FAINT, lw=0.8)
            axis.set(title=short(place), xlim=(0, longest), ylim=(0, 100), xlabel="simulator steps")
            axis.locator_params(axis="x", nbins=3)
        for axis in grid[::columns]:
            axis.set_ylabel("succeeded so far, %")
        grid[0].legend(loc="lower right", bbox_to_anchor=(1.02, 0))
        return done()


def latency(entries: Sequence[Latency]) -> str:
    """Mean milliseconds by part, stacked, with p50 and p99 of the total."""
    with figure(WIDTH, 0.95 + 0.5 * len(entries)) as (_, axis, done):
        names = [part for part in (*PARTS, "other") if any(part in e.mean_parts for e in entries)]
        for row, entry in enumerate(entries):
            left = 0.0
            for part in names:
                width = entry.mean_parts.get(part, 0.0)
                colour = SERIES[names.index(part) % 5]
                label = PART_NAMES.get(part, part) if row == 0 else None
                axis.barh(row, width, 0.5, left, color=colour, edgecolor=PAPER, lw=0.8, label=label)
                left += width
            axis.plot([entry.total.p50] * 2, [row - 0.36, row + 0.36], color=INK, lw=2, label="p50" if row == 0 else None)
            axis.plot(entry.total.p99, row, "D", color=INK, ms=5, label="p99" if row == 0 else None)
        axis.set_yticks(range(len(entries)), [e.compute for e in entries])
        axis.set(xlabel="milliseconds per chunk (bars: mean of each part)", xlim=(0, 1.08 * max(e.total.p99 for e in entries)))
        axis.set_ylim(len(entries) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0, pad=8)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=LEGEND_COLUMNS)
        return done()


def loss(entries: Sequence[Mapping[str, Any]], label: str) -> str:
    """Training loss, its running mean, and the loss on held-out episodes; entries as in ``training/log.jsonl``.

    Steps on questions have another kind of loss and are left out.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    entries = [e for e in entries if "loss" in e]

    steps = np.array([e["step"] for e in entries], float)
    values = np.array([e["loss"] for e in entries], float)
    window = max(1, len(values) // 40)
    with figure(WIDTH, 2.6) as (_, axis, done):
        axis.plot(steps, values, color=FAINT, lw=0.7, label="training, each batch")
        if window > 1:
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axis.plot(steps[window - 1 :], smooth, color=SERIES[0], lw=1.8, label=f"training, mean of {window} steps")
        held = [(e["step"], e["validation"]["loss"]) for e in entries if "loss" in (e.get("validation") or ())]
        if held:
            axis.plot(*zip(*held, strict=True), color=SERIES[1], marker="s", ms=4, ls="--", lw=1.2, label="held-out episodes")
        axis.set(xlabel="optimiser steps", ylabel=label)
        if values.max() > 10 * values.min() > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_ylim(bottom=0)
        axis.legend(loc="upper right")
        return done()


def chunk(video: EpisodeVideo, shown: VideoChunk) -> str:
    """One chunk: every dimension over the step limit, draft and final actions, confidence below."""
    actions = np.array(shown.actions)
    draft = None if shown.draft is None else np.array(shown.draft)
    doubted = np.flatnonzero(shown.regenerated) if shown.regenerated else np.array([], int)
    n, rated = actions.shape[1], shown.confidence is not None
    ratios = [1.0] * n + ([0.9] if rated else [])
    with figure(4.4, 0.6 * len(ratios) + 0.75, len(ratios), 1, sharex=True, height_ratios=ratios) as (_, axes, done):
        grid = np.atleast_1d(axes)
        x = np.arange(len(actions))
        for axis in grid:
            for token in doubted:
                axis.axvspan(token - 0.5, token + 0.5, color=FAINT, alpha=0.35, lw=0)
            if shown.executed < len(actions):
                axis.axvline(shown.executed - 0.5, color=INK, lw=0.8, ls=":")
        for d in range(n):
            if draft is not None:
                grid[d].plot(x, draft[:, d], color=SERIES[1], ls="--", lw=1.4)
            grid[d].plot(x, actions[:, d], color=SERIES[0], lw=1.6, marker="o", ms=2.5)
            grid[d].set(ylim=(-1.15, 1.15), yticks=(-1, 0, 1))
            grid[d].set_ylabel(video.dimensions[d], rotation=0, ha="right", va="center")
        if shown.confidence is not None:
            grid[-1].bar(x, shown.confidence, 0.7, color=SERIES[2])
            grid[-1].axhline(0.5, color=INK, lw=0.8)
            grid[-1].set(ylim=(0, 1), yticks=(0, 1))
            grid[-1].set_ylabel("confidence", rotation=0, ha="right", va="center")
        grid[-1].set(xlabel="action of the chunk", xlim=(-0.5, len(actions) - 0.5), xticks=x[:: max(1, len(x) // 8)])
        return done()


def minutes(spent: Minutes) -> str:
    """Wall time by step, one stacked bar."""
    known = [(name, value) for name, value in spent.steps.items() if value]
    columns = min(len(known), LEGEND_COLUMNS)
    with figure(WIDTH, 0.95 + 0.2 * -(-len(known) // columns)) as (_, axis, done):
        left = 0.0
        for i, (name, value) in enumerate(known):
            axis.barh(0, value, 0.6, left, color=SERIES[i % 5], edgecolor=PAPER, label=f"{name} {value:.1f}")
            left += value
        axis.set(yticks=[], xlabel="minutes of wall time", xlim=(0, left * 1.001))
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)
        return done()
