"""Plots of the revision of a chunk: every token at every step, and the decoded actions."""

from __future__ import annotations

import numpy as np

from vlaflow.evaluation.results import Evaluation
from vlaflow.evaluation.revision import HIDDEN, Revision
from vlaflow.reports.figure import FAINT, INK, LINES, SERIES, WIDTH, figure


def tokens(found: Revision) -> str:
    """A cell per step and slot, darker for a higher probability, with a dot where the step changed the token."""
    id_NS, chance_NS = np.array(found.tokens), np.array(found.probability)
    steps, slots = id_NS.shape
    with figure(WIDTH, 0.9 + 0.075 * slots) as (_, axis, done):
        for n in range(steps):
            shown_S = id_NS[n] != HIDDEN
            end_S = shown_S & (id_NS[n] == found.end) if found.end is not None else np.zeros(slots, bool)
            y = np.arange(slots)
            for place in np.flatnonzero(shown_S & ~end_S):
                axis.plot(n, place, "s", color=SERIES[0], ms=4.6, alpha=0.12 + 0.88 * float(chance_NS[n, place]), mew=0)
            axis.plot(np.full(end_S.sum(), n), y[end_S], "s", color=FAINT, ms=2.2, mew=0)
            if n:
                changed_S = id_NS[n] != id_NS[n - 1]
                axis.plot(np.full(changed_S.sum(), n), y[changed_S], "o", color=SERIES[1], ms=2.6, mew=0)
        if found.settling:
            axis.axvline(steps - found.settling - 0.5, color=INK, lw=0.8, ls=":")
        axis.set(xlabel="step (0: the start)", ylabel="token slot", xlim=(-0.6, steps - 0.4), ylim=(slots - 0.4, -0.6))
        return done()


def actions(found: Revision) -> str:
    """A curve per step and dimension, darkest for the last step."""
    action_NLD = np.array(found.actions)
    steps, length, dims = action_NLD.shape
    x = np.arange(1, length + 1)
    with figure(WIDTH, 1.0 * dims + 0.4, dims, 1, sharex=True, squeeze=False) as (_, axes, done):
        for d, axis in enumerate(axes[:, 0]):
            for n in range(1, steps - 1):
                axis.plot(x, action_NLD[n, :, d], color=SERIES[0], lw=0.9, alpha=0.1 + 0.7 * n / steps)
            axis.plot(x, action_NLD[0, :, d], color=FAINT, lw=0.9, ls=LINES[2], label="noise")
            axis.plot(x, action_NLD[-1, :, d], color=INK, lw=1.8, label="sent")
            axis.set_ylabel(found.dimensions[d])
        axes[-1, 0].set_xlabel("action of the chunk")
        axes[0, 0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        return done()


def revised(entries: list[Evaluation]) -> str:
    """Tokens that each step changes, mean over all chunks of all episodes, one line per compute policy."""
    with figure(WIDTH, 2.2) as (_, axis, done):
        for i, compute in enumerate(dict.fromkeys(e.compute for e in entries)):
            mine = [e for e in entries if e.compute == compute]
            chunks = [sum(p.chunks for p in e.per_episode) for e in mine]
            most = max(len(e.revised_per_chunk) for e in mine)
            padded = [np.pad(e.revised_per_chunk, (0, most - len(e.revised_per_chunk))) for e in mine]
            mean = np.average(padded, axis=0, weights=chunks)
            axis.plot(
                np.arange(1, most + 1), mean, color=SERIES[i % 5], ls=LINES[i % 5], marker="o", ms=3, lw=1.4, label=compute
            )
        axis.set(xlabel="step", ylabel="tokens changed, mean", ylim=(0, None))
        axis.legend(loc="upper right")
        return done()
