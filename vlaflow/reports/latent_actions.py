"""The page of a latent action model: usage of its codes, reconstructions, and their effect on other first frames.

Shape letters: H, W height and width of an image, R example pairs, K codes, V entries of the codebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlaflow.evaluation.latent_report import LatentExamples, Pixels, Usage
from vlaflow.reports import page
from vlaflow.reports.figure import INK, SERIES, WIDTH, figure
from vlaflow.reports.page import Figure, Table, image_url

GAIN = 2.0
"""Amplification of changes, around grey."""
SOURCES = {
    "codes": "the codes",
    "vectors": "the vectors before quantisation",
    "task": "the task alone",
    "chance": "other pairs' codes",
}


@dataclass(frozen=True)
class LatentMeasurements:
    """The content of the page.

    Args:
        usage, pixels: measurements on held-out pairs.
        probes: see ``latent_report.probes``.
        examples: example pairs.
        names: names of the action dimensions.
        facts: name and value, for the table at the end.
    """

    usage: Usage
    pixels: Pixels
    probes: Mapping[str, np.ndarray]
    examples: LatentExamples
    names: Sequence[str]
    facts: Mapping[str, str]


def write_page(found: LatentMeasurements, title: str, file: Path) -> Path:
    """Write one self-contained HTML file."""
    usage, pixels, shown = found.usage, found.pixels, found.examples
    tiles = [
        (f"{usage.used} of {len(usage.share_V)}", "entries used with at least a tenth of the fair share"),
        (f"{usage.perplexity:.1f}", f"perplexity, at most {len(usage.share_V)}"),
        (f"{100 * pixels.explained:.0f} %", "of the change in pixels is reconstructed from the codes"),
    ]
    if found.probes:
        tiles.append((f"{np.nanmean(found.probes['codes']):.2f}", "of the action variance predicted from the codes"))
    places = ", ".join(f"{value:.1f}" for value in usage.place_perplexity)
    caption = f"Share of each entry among the codes of {usage.pairs} held-out pairs; the line is the fair share."
    return page.write(
        file,
        "latent_actions.html",
        title=title,
        tile_entries=tiles,
        shares=Figure(shares(usage), caption),
        usage_text=f"{usage.distinct} of the {usage.pairs} pairs have distinct codes. Perplexity by position: {places}.",
        pixels=pixel_table(pixels),
        reconstructions=reconstructions(shown),
        reconstructions_text=f"Held-out pairs {shown.gap_s:g} s apart. The last two columns are amplified {GAIN:g} times "
        "around grey.",
        transfer=transfer(shown),
        probes=probe_table(found) if found.probes else None,
        fact_entries=found.facts,
    )


def shares(usage: Usage) -> str:
    """A bar per codebook entry."""
    with figure(WIDTH, 2.0) as (_, axis, done):
        axis.bar(np.arange(len(usage.share_V)), 100 * usage.share_V, 0.75, color=SERIES[0])
        axis.axhline(100 / len(usage.share_V), color=INK, lw=1, ls="--")
        axis.set(xlabel="codebook entry", ylabel="% of the codes", xlim=(-0.8, len(usage.share_V) - 0.2))
        return done()


def reconstructions(shown: LatentExamples) -> list[tuple[str, list[str]]]:
    """A row per pair: its codes, both frames, the prediction, and both changes."""
    rows = []
    for ids, a, b, c in zip(shown.id_RK, shown.earlier, shown.later, shown.decoded, strict=True):
        rows.append((_codes(ids), [image_url(image) for image in (a, b, c, difference(b, a), difference(c, a))]))
    return rows


def transfer(shown: LatentExamples) -> list[tuple[str, list[str]]]:
    """A row per pair whose codes are used, a column per first frame to which they are applied."""
    rows = [("first frame", [image_url(image) for image in shown.earlier])]
    for ids, made in zip(shown.id_RK, shown.transferred, strict=True):
        rows.append((_codes(ids), [image_url(difference(b, a)) for a, b in zip(shown.earlier, made, strict=True)]))
    return rows


def difference(image_HW3: np.ndarray, before_HW3: np.ndarray) -> np.ndarray:
    """A change as an image, grey where nothing changes: uint8 (H, W, 3)."""
    return (127.5 + GAIN * (image_HW3.astype(float) - before_HW3)).round().clip(0, 255).astype(np.uint8)


def pixel_table(pixels: Pixels) -> Table:
    """Errors of the prediction of the later frame, and of its baselines."""
    named = {"the earlier frame": pixels.copy, "decoded": pixels.decoded, "decoded with another pair's codes": pixels.other}
    rows = [
        (
            name,
            f"{value:.5f}",
            f"{-10 * np.log10(max(value, 1e-12)):.1f}",
            f"{100 * (1 - value / pixels.copy) if pixels.copy else 0:.0f} %",
        )
        for name, value in named.items()
    ]
    heads = ("instead of the later frame", "squared error", "PSNR, dB", "of the change")
    return Table(heads, rows, caption="Pixels in [0, 1], held-out pairs.")


def probe_table(found: LatentMeasurements) -> Table:
    """How well the actions are predicted, by dimension and on average."""
    rows = [
        (SOURCES[name], *("" if np.isnan(value) else f"{value:.2f}" for value in (*value_D, np.nanmean(value_D))))
        for name, value_D in found.probes.items()
    ]
    caption = (
        "Share of the variance of the mean action between the frames that ridge regression explains on held-out episodes; "
        "empty for dimensions that are constant there."
    )
    return Table(("predicted from", *found.names, "mean"), rows, caption=caption)


def _codes(id_K: np.ndarray) -> str:
    return " ".join(str(value) for value in id_K)
