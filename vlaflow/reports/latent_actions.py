"""The page of a latent action model: how its codes are used, what they bring back, and what they do to other first frames.

Shape letters: H, W height and width of an image, K codes, V entries of the book.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from vlaflow.actions.latent import LatentActionModel
from vlaflow.evaluation.latent_report import Pixels, Seen, Usage
from vlaflow.reports.plots import INK, SERIES, WIDTH, figure

ROWS = 6
"""Pairs that are shown."""
GAIN = 2.0
"""By how much the images of a change are amplified around grey."""


@dataclass(frozen=True)
class Found:
    """Everything the page tells.

    Args:
        usage, pixels: of held-out pairs.
        probes: see ``latent_report.probes``.
        names: of the action dimensions.
        facts: name and value, for the table at the end.
    """

    usage: Usage
    pixels: Pixels
    probes: Mapping[str, np.ndarray]
    names: Sequence[str]
    facts: Mapping[str, str]


def write_page(model: LatentActionModel, seen: Seen, found: Found, title: str, file: Path) -> Path:
    """One self-contained HTML file.

    Args:
        model: the latent action model.
        seen: held-out pairs.
        found: what was measured on them.
        title: of the page.
        file: where to.
    """
    css = resources.files("vlaflow.reports").joinpath("templates", "report.css").read_text()
    usage, pixels = found.usage, found.pixels
    tiles = [
        (f"{usage.used} of {len(usage.share_V)}", "entries used at a tenth of their fair share or more"),
        (f"{usage.perplexity:.1f}", f"perplexity, at most {len(usage.share_V)}"),
        (f"{100 * pixels.explained:.0f} %", "of the change in pixels is brought back by the codes"),
    ]
    if found.probes:
        tiles.append((f"{np.nanmean(found.probes['codes']):.2f}", "of the actions' variance is told by the codes (0: none)"))
    shown = examples(seen)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        '<div class="tiles">' + "".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in tiles) + "</div>",
        "<h2>Use of the book</h2>",
        _figure(
            shares(usage), f"Share of each entry among the codes of {usage.pairs} held-out pairs; the line is an even share."
        ),
        f"<p>{usage.distinct} of the {usage.pairs} pairs' rows of codes are different. Perplexity by place: "
        f"{', '.join(f'{value:.1f}' for value in place_perplexity(usage))}.</p>",
        "<h2>What the codes bring back</h2>",
        _pixel_table(pixels),
        reconstructions(model, seen, shown),
        "<h2>The same codes on other first frames</h2>",
        transfer(model, seen, shown),
    ]
    if found.probes:
        body += ["<h2>Do the codes tell the actions?</h2>", _probe_table(found)]
    body += ["<h2>Facts</h2>", _facts(found.facts)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{css}{STYLE}'
        f"</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )
    return file


STYLE = """
table.images td, table.images th { border: 0; padding: .15rem .25rem; text-align: center; white-space: normal;
  vertical-align: middle; }
table.images th { font-size: .82rem; vertical-align: bottom; }
table.images img { width: 6.4rem; height: 6.4rem; image-rendering: pixelated; border-radius: .25rem; display: block; }
table.images td.codes { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .8rem; text-align: left; }
"""


def examples(seen: Seen) -> np.ndarray:
    """Places in ``seen`` of ``ROWS`` pairs in which much moves, task by task in turn."""
    earlier, later = seen.pairs.frames(seen.index_M)
    change_M = (earlier.float() - later.float()).square().mean((1, 2, 3)).numpy()
    tasks = np.unique(seen.task_M)
    chosen = []
    for number in range(min(ROWS, len(change_M))):
        members = np.flatnonzero(seen.task_M == tasks[number % len(tasks)])
        order = members[np.argsort(change_M[members])]
        # from the ninth tenth down by a fifth, so that a task that comes again shows another pair
        chosen.append(order[int((0.9 - 0.2 * (number // len(tasks))) * (len(order) - 1))])
    return np.array(chosen)


def shares(usage: Usage) -> str:
    """A bar per entry."""
    with figure(WIDTH, 2.0) as (_, axis, done):
        axis.bar(np.arange(len(usage.share_V)), 100 * usage.share_V, 0.75, color=SERIES[0])
        axis.axhline(100 / len(usage.share_V), color=INK, lw=1, ls="--")
        axis.set(xlabel="entry of the book", ylabel="% of the codes", xlim=(-0.8, len(usage.share_V) - 0.2))
        return done()


def place_perplexity(usage: Usage) -> np.ndarray:
    """Perplexity of each of the K places, (K,)."""
    share_KV = np.where(usage.share_KV > 0, usage.share_KV, 1.0)
    return np.exp(-(usage.share_KV * np.log(share_KV)).sum(1))


def reconstructions(model: LatentActionModel, seen: Seen, shown: np.ndarray) -> str:
    """A row per pair: both frames, what was decoded, and both changes."""
    earlier, later = seen.pairs.frames(seen.index_M[shown])
    decoded = model.apply_codes(earlier, torch.from_numpy(seen.id_MK[shown])).cpu()
    head = ("codes", "earlier", "later", "decoded", "change", "decoded change")
    rows = []
    for row, place in enumerate(shown):
        a, b, c = (images[row].numpy() for images in (earlier, later, decoded))
        pictures = (a, b, c, difference(b, a), difference(c, a))
        rows.append(_codes(seen.id_MK[place]) + "".join(_picture(p) for p in pictures))
    text = f"Held-out pairs {seen.pairs.gap_s:g} s apart. The last two columns are amplified {GAIN:g} times around grey."
    return _pictures(head, rows, text)


def transfer(model: LatentActionModel, seen: Seen, shown: np.ndarray) -> str:
    """A row per pair whose codes are taken, a column per first frame they are applied to."""
    earlier, _ = seen.pairs.frames(seen.index_M[shown])
    first = "".join(_picture(image.numpy()) for image in earlier)
    rows = [f'<td class="codes">first frame</td>{first}']
    for place in shown:
        id_BK = torch.from_numpy(seen.id_MK[place]).expand(len(shown), -1)
        made = model.apply_codes(earlier, id_BK).cpu()
        cells = "".join(_picture(difference(b.numpy(), a.numpy())) for a, b in zip(earlier, made, strict=True))
        rows.append(_codes(seen.id_MK[place]) + cells)
    text = (
        "Each row applies the codes of one pair to every first frame and shows the change, amplified; on the diagonal stands "
        "the pair's own first frame. Codes that mean a motion change the frames of a row alike, if there is something to move."
    )
    return _pictures(("codes", *[""] * len(shown)), rows, text)


def difference(image_HW3: np.ndarray, before_HW3: np.ndarray) -> np.ndarray:
    """A change as an image: grey where nothing changed, uint8 (H, W, 3)."""
    return (127.5 + GAIN * (image_HW3.astype(float) - before_HW3)).round().clip(0, 255).astype(np.uint8)


def _pixel_table(pixels: Pixels) -> str:
    named = {"the earlier frame": pixels.copy, "decoded": pixels.decoded, "decoded with another pair's codes": pixels.other}
    rows = "".join(
        f"<tr><td>{name}</td><td>{value:.5f}</td><td>{-10 * np.log10(max(value, 1e-12)):.1f}</td>"
        f"<td>{100 * (1 - value / pixels.copy) if pixels.copy else 0:.0f} %</td></tr>"
        for name, value in named.items()
    )
    head = "<th>in place of the later frame</th><th>squared error</th><th>PSNR, dB</th><th>of the change</th>"
    return f"<table><caption>Pixels in [0, 1], held-out pairs.</caption><thead><tr>{head}</tr></thead>{rows}</table>"


def _probe_table(found: Found) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("told from", *found.names, "mean"))
    words = {
        "codes": "the codes",
        "vectors": "the vectors before quantisation",
        "task": "the task alone",
        "chance": "other pairs' codes",
    }
    rows = ""
    for name, value_D in found.probes.items():
        cells = ("" if np.isnan(value) else f"{value:.2f}" for value in (*value_D, np.nanmean(value_D)))
        rows += f"<tr><td>{words[name]}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    caption = (
        "Share of the variance of the mean action between the frames that ridge regression explains on held-out episodes; "
        "empty for a dimension that stands still in them."
    )
    return f'<div class="wide"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>{rows}</table></div>'


def _facts(facts: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items()) + "</dl>"


def _figure(svg: str, text: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(text)}</figcaption></figure>"


def _pictures(head: Sequence[str], rows: Sequence[str], text: str) -> str:
    cells = "".join(f"<th>{name}</th>" for name in head)
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    table = f'<table class="images"><thead><tr>{cells}</tr></thead>{lines}</table>'
    return f'<div class="wide">{table}</div><p class="soft">{text}</p>'


def _codes(id_K: np.ndarray) -> str:
    return f'<td class="codes">{" ".join(str(value) for value in id_K)}</td>'


def _picture(image_HW3: np.ndarray) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image_HW3).save(stream, "PNG")
    return f'<td><img alt="" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"></td>'
