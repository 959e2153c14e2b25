"""The page of a tokenizer report: error against length, lengths of sequences, and a chunk as each tokenizer gives it back."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from vlaflow.actions.fast import FastTokenizer
from vlaflow.evaluation.tokenizer_report import Fitted, Material, Quality, describe, example_chunk, lengths
from vlaflow.reports.plots import FAINT, INK, LINES, MARKERS, SERIES, WIDTH, figure

SHOWN = 3
"""Tokenizers whose example chunk is drawn; more lines cannot be told apart."""


def write_page(
    measured: Sequence[tuple[Quality, Fitted]], chunks: Material, names: Sequence[str], title: str, file: Path
) -> Path:
    """One self-contained HTML file.

    Args:
        measured: tokenizers and what was found of them.
        chunks: what they were measured on.
        names: of the action dimensions.
        title: of the page.
        file: where to.
    """
    found, tokenizers = [quality for quality, _ in measured], [tokenizer for _, tokenizer in measured]
    css = resources.files("vlaflow.reports").joinpath("templates", "report.css").read_text()
    figures = (
        (trade_off(found), "Error of reconstruction against tokens per chunk: left and low is better."),
        (
            histograms(tokenizers, chunks),
            "How many tokens a held-out chunk takes, by tokenizers whose sequences differ in length.",
        ),
        (
            example(tokenizers, chunks, names),
            "The held-out chunk that moves most: as demonstrated (dark) and as decoded from its tokens.",
        ),
    )
    drawn = "".join(
        f"<figure>{svg}<figcaption>{html.escape(text)}</figcaption></figure>" for svg, text in figures if svg is not None
    )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADINGS)
    rows = "".join(
        f'<tr><td style="text-align:left">{html.escape(first)}</td>' + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        for first, *rest in map(cells, found)
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{css}</style>'
        f"</head><body><main><h1>{html.escape(title)}</h1><table><thead><tr>{head}</tr></thead>{rows}</table>{drawn}"
        f"<p>{READING}</p></main></body></html>\n"
    )
    return file


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


def histograms(tokenizers: Sequence[Fitted], chunks: Material) -> str | None:
    """Step histograms of sequence lengths; None where all have one length."""
    chosen = [t for t in tokenizers if isinstance(t, FastTokenizer)][:5]
    if not chosen:
        return None
    with figure(WIDTH, 2.4) as (_, axis, done):
        for i, tokenizer in enumerate(chosen):
            length_N = lengths(tokenizer, tokenizer.encode(chunks.held))
            share = np.bincount(length_N) / len(length_N)
            label = describe(tokenizer)
            axis.step(np.arange(len(share)), 100 * share, where="mid", color=SERIES[i], ls=LINES[i], lw=1.6, label=label)
        axis.set(xlabel="tokens", ylabel="% of the chunks", ylim=(0, None))
        axis.legend(loc="upper right")
        return done()


def example(tokenizers: Sequence[Fitted], chunks: Material, names: Sequence[str]) -> str:
    """One row per action dimension."""
    chunk_LD = example_chunk(chunks)
    x = np.arange(1, len(chunk_LD) + 1)
    chosen = tokenizers[:: -(-len(tokenizers) // SHOWN)]
    with figure(WIDTH, 1.0 * len(names) + 0.5, len(names), 1, sharex=True, squeeze=False) as (_, axes, done):
        for d, axis in enumerate(axes[:, 0]):
            axis.plot(x, chunk_LD[:, d], color=INK, lw=2.2)
            for i, tokenizer in enumerate(chosen):
                decoded_LD = tokenizer.decode(tokenizer.encode(chunk_LD[None])).action_BLD[0]
                axis.plot(x, decoded_LD[:, d], color=SERIES[i], ls=LINES[i + 1], lw=1.4, label=describe(tokenizer))
            axis.axhline(0, color=FAINT, lw=0.5)
            axis.set_ylabel(names[d])
        axes[-1, 0].set_xlabel("action of the chunk")
        axes[0, 0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=SHOWN)
        return done()
