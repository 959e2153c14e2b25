"""How every page is made: a template that extends ``templates/base.html``, filled with values, in one self-contained file.

A template lays out what a page module hands it and computes nothing. Text is escaped; drawings are our own SVG, in which
matplotlib has escaped the text, and are not.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import jinja2

Cell = str | tuple[str, str]
"""Text, or text and a smaller remark after it."""


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        heads: of the columns.
        rows: as many cells each.
        text: columns that are aligned as text; numbers stand to the right.
        totals: rows with a rule above them.
        caption: above the table.
        dense: many narrow columns.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text: Collection[int] = (0,)
    totals: Collection[int] = ()
    caption: str = ""
    dense: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawing made with ``figure.figure``, which is put into the page as it is, and what it shows in a sentence."""

    svg: str
    caption: str = ""


def write(file: Path, template: str, **values: Any) -> Path:
    """Fill a template and write the page whole or not at all; returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(render(template, **values), encoding="utf-8")
    part.replace(file)
    return file


def render(template: str, **values: Any) -> str:
    """The page as text."""
    return _number_ids(_templates().get_template(template).render(**values))


def data_url(content: bytes, kind: str) -> str:
    """A file inside the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_url(image_HW3: np.ndarray) -> str:
    """A uint8 image inside the page, as PNG."""
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
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _number_ids(page: str) -> str:
    """Every drawing was made alone, so their ids repeat; in one page each drawing gets ids of its own."""
    number = 0

    def own(found: re.Match[str]) -> str:
        nonlocal number
        number += 1
        svg = re.sub(r'\bid="', f'id="f{number}-', found[0])
        return svg.replace("url(#", f"url(#f{number}-").replace('xlink:href="#', f'href="#f{number}-')

    return re.sub(r"<svg.*?</svg>", own, page, flags=re.DOTALL)
