"""Figures as inline SVG with the colours of the page, so that one page works in light mode, dark mode and print.

Matplotlib draws with placeholder colours, which are then replaced by CSS variables (defined in ``templates/report.css``).
Colours differ in lightness as well as hue, and every series has its own marker or line, so figures work in greyscale too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INK, FAINT, PAPER = "#010101", "#010102", "#010103"
SERIES = ("#010201", "#010202", "#010203", "#010204", "#010205")
_CSS = {INK: "var(--ink)", FAINT: "var(--faint)", PAPER: "var(--paper)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, 1)
}
MARKERS, LINES = "os^Dv", ("-", "--", ":", "-.", (0, (1, 1)))
WIDTH = 5.6
"""Width in inches, so that text is readable on a desktop screen and on a phone."""


@contextmanager
def figure(width: float, height: float, rows: int = 1, columns: int = 1, **settings: Any) -> Iterator[tuple[Any, Any, Any]]:
    """A matplotlib figure, its axes, and a function that returns the finished SVG. No global state is changed."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "vlaflow",
        "font.size": 8.5,
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.facecolor": "none",
        "legend.frameon": False,
        "legend.handlelength": 1.8,
        "legend.columnspacing": 1.4,
    }
    with mpl.rc_context(style):
        drawn = Figure((width, height), layout="constrained")
        FigureCanvasSVG(drawn)
        axes = drawn.subplots(rows, columns, **settings)

        def done() -> str:
            text = io.StringIO()
            drawn.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            return _inline(text.getvalue())

        yield drawn, axes, done


def _inline(svg: str) -> str:
    """Adapt an SVG file for use within a page: colours of the page, width of the column, no metadata."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns:xlink="[^"]*"| xmlns="[^"]*"', "", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', svg, count=1)
    svg = re.sub(r"font: ([^;\"]*?)'?(DejaVu Sans|sans-serif).*?(?=[;\"])", r"font: \1var(--font)", svg)
    for colour, variable in _CSS.items():
        svg = svg.replace(colour, variable)
    return svg
