"""The page of a tokenizer report: error against length, lengths of sequences, and a chunk as each tokenizer gives it back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlaflow.evaluation.tokenizer_report import Examples, Quality
from vlaflow.reports import page
from vlaflow.reports.figure import FAINT, INK, LINES, MARKERS, SERIES, WIDTH, figure
from vlaflow.reports.page import Figure, Table


def write_page(found: Sequence[Quality], shown: Examples, title: str, file: Path) -> Path:
    """One self-contained HTML file.

    Args:
        found: what was measured of each tokenizer.
        shown: what is drawn.
        title: of the page.
        file: where to.
    """
    figures = [Figure(trade_off(found), "Error of reconstruction against tokens per chunk: left and low is better.")]
    if shown.length_share:
        text = "How many tokens a held-out chunk takes, by tokenizers whose sequences differ in length."
        figures.append(Figure(histograms(shown), text))
    text = "The held-out chunk that moves most: as demonstrated (dark) and as decoded from its tokens."
    figures.append(Figure(example(shown), text))
    measured = Table(HEADINGS, [cells(row) for row in found])
    return page.write(file, "tokenizers.html", title=title, measured=measured, figures=figures, reading=READING)


READING = (
    "Errors are root mean squares in normalised units. “id ±1” and “random id”: how far one such change of one token moves the "
    "chunk, median; “repaired”: random changes after which the tokens no longer describe a chunk exactly; “order”: rank "
    "correlation of the difference of two ids with the change of the chunk, 1 where ids are a metric of actions."
)
HEADINGS = (
    "tokenizer",
    "ids",
    "slots",
    "tokens",
    "numbers per token",
    "compression",
    "error (rms)",
    "largest error",
    "inexact chunks",
    "id ±1",
    "random id",
    "repaired",
    "order",
)


def cells(row: Quality) -> tuple[str, ...]:
    """One line of the table, as texts."""
    return (
        row.name,
        str(row.vocabulary),
        str(row.slots),
        f"{row.tokens:.1f}",
        f"{row.numbers_per_token:.1f}",
        f"{row.compression:.1f}×",
        f"{row.error:.4f}",
        f"{row.largest:.3f}",
        f"{100 * row.inexact:.2f} %",
        f"{row.neighbour:.3f}",
        f"{row.random:.3f}",
        f"{100 * row.repaired:.0f} %",
        f"{row.order:.2f}",
    )


def trade_off(found: Sequence[Quality]) -> str:
    """A point per tokenizer, named."""
    with figure(WIDTH, 2.8) as (_, axis, done):
        for i, row in enumerate(found):
            axis.plot(row.tokens, row.error, MARKERS[i % 5], color=SERIES[i % 5], ms=6)
            axis.annotate(row.name, (row.tokens, row.error), (6, 0), textcoords="offset points", va="center", fontsize=7)
        axis.set(xlabel="tokens per chunk, mean", ylabel="error, rms, normalised", ylim=(0, None))
        axis.margins(x=0.25)
        return done()


def histograms(shown: Examples) -> str:
    """Step histograms of sequence lengths."""
    with figure(WIDTH, 2.4) as (_, axis, done):
        for i, (name, share) in enumerate(shown.length_share.items()):
            axis.step(np.arange(len(share)), 100 * share, where="mid", color=SERIES[i], ls=LINES[i], lw=1.6, label=name)
        axis.set(xlabel="tokens", ylabel="% of the chunks", ylim=(0, None))
        axis.legend(loc="upper right")
        return done()


def example(shown: Examples) -> str:
    """One row per action dimension."""
    x, dims = np.arange(1, len(shown.chunk_LD) + 1), len(shown.dimensions)
    with figure(WIDTH, 1.0 * dims + 0.5, dims, 1, sharex=True, squeeze=False) as (_, axes, done):
        for d, axis in enumerate(axes[:, 0]):
            axis.plot(x, shown.chunk_LD[:, d], color=INK, lw=2.2)
            for i, (name, decoded_LD) in enumerate(shown.decoded.items()):
                axis.plot(x, decoded_LD[:, d], color=SERIES[i], ls=LINES[i + 1], lw=1.4, label=name)
            axis.axhline(0, color=FAINT, lw=0.5)
            axis.set_ylabel(shown.dimensions[d])
        axes[-1, 0].set_xlabel("action of the chunk")
        axes[0, 0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(shown.decoded))
        return done()
