"""The page of a tokenizer report: error against length, lengths of sequences, and a chunk reconstructed by each tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlaflow.evaluation.tokenizer_report import Quality, TokenizerExamples
from vlaflow.reports import page
from vlaflow.reports.figure import FAINT, INK, LINES, MARKERS, SERIES, WIDTH, figure
from vlaflow.reports.page import Figure, Table


def write_page(found: Sequence[Quality], shown: TokenizerExamples, title: str, file: Path) -> Path:
    """Write one self-contained HTML file.

    Args:
        found: measurements of each tokenizer.
        shown: data of the plots.
        title: title of the page.
        file: the page to write.
    """
    figures = [Figure(trade_off(found), "Reconstruction error against tokens per chunk: low and left is better.")]
    if shown.length_share:
        text = "Number of tokens of a held-out chunk, for tokenizers with sequences of different lengths."
        figures.append(Figure(histograms(shown), text))
    text = "The held-out chunk with the most motion: as demonstrated (dark) and as decoded from its tokens."
    figures.append(Figure(example(shown), text))
    measured = Table(HEADINGS, [cells(row) for row in found])
    return page.write(file, "tokenizers.html", title=title, measured=measured, figures=figures, reading=READING)


READING = (
    "Errors are root mean squares in normalised units. “id ±1” and “random id”: median change of the chunk when one token is "
    "changed in this way; “repaired”: share of random changes after which the tokens are no longer a valid encoding; “order”: "
    "rank correlation of the difference of two ids with the change of the chunk, 1 if ids are a metric of actions."
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
    """One row of the table, as text."""
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
    """A labelled point per tokenizer."""
    with figure(WIDTH, 2.8) as (_, axis, done):
        for i, row in enumerate(found):
            axis.plot(row.tokens, row.error, MARKERS[i % 5], color=SERIES[i % 5], ms=6)
            axis.annotate(row.name, (row.tokens, row.error), (6, 0), textcoords="offset points", va="center", fontsize=7)
        axis.set(xlabel="tokens per chunk, mean", ylabel="error, rms, normalised", ylim=(0, None))
        axis.margins(x=0.25)
        return done()


def histograms(shown: TokenizerExamples) -> str:
    """Step histograms of sequence lengths."""
    with figure(WIDTH, 2.4) as (_, axis, done):
        for i, (name, share) in enumerate(shown.length_share.items()):
            axis.step(np.arange(len(share)), 100 * share, where="mid", color=SERIES[i], ls=LINES[i], lw=1.6, label=name)
        axis.set(xlabel="tokens", ylabel="% of the chunks", ylim=(0, None))
        axis.legend(loc="upper right")
        return done()


def example(shown: TokenizerExamples) -> str:
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
