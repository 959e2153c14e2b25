"""Pages as self-contained files: a template that extends ``templates/base.html``, filled with values.

A template lays out the values of a page module and computes nothing. Text is escaped; figures are not, because they are SVG
from matplotlib, which escapes text itself.
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlaflow.outputs import write_text
from vlaflow.text import printable

if TYPE_CHECKING:
    import jinja2

Cell = str | tuple[str, str]
"""Text, or text and a smaller remark."""


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        heads: headings of the columns.
        rows: rows of cells, one per column.
        text: columns that are aligned left, as text; the others are aligned right.
        totals: rows with a rule above them.
        caption: text above the table.
        dense: whether there are many narrow columns.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text: Collection[int] = (0,)
    totals: Collection[int] = ()
    caption: str = ""
    dense: bool = False


@dataclass(frozen=True)
class Figure:
    """An SVG made with ``figure.figure``, and its caption."""

    svg: str
    caption: str = ""


def write(file: Path, template: str, **values: Any) -> Path:
    """Fill a template and write the page, whole or not at all; returns the file."""
    write_text(file, render(template, **values))
    return file


def render(template: str, **values: Any) -> str:
    """Fill a template and return the page as text."""
    return _number_ids(_templates().get_template(template).render(**values))


def data_url(content: bytes, kind: str) -> str:
    """Encode a file as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_url(image_HW3: np.ndarray) -> str:
    """Encode a uint8 image as the data URL of a PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image_HW3).save(stream, "PNG")
    return data_url(stream.getvalue(), "image/png")


@functools.cache
def _templates() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("vlaflow.reports"),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    """A value of a template: in text, control characters are spelled out; what is markup already stays."""
    return printable(value) if type(value) is str else value


def _number_ids(page: str) -> str:
    """Make the ids of the figures unique within the page, because every figure was made separately."""
    number = 0

    def own(found: re.Match[str]) -> str:
        nonlocal number
        number += 1
        svg = re.sub(r'\bid="', f'id="f{number}-', found[0])
        return svg.replace("url(#", f"url(#f{number}-").replace('xlink:href="#', f'href="#f{number}-')

    return re.sub(r"<svg.*?</svg>", own, page, flags=re.DOTALL)
