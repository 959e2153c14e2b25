"""Text that others wrote, in errors, in the terminal and on pages: it is shown, never interpreted, and kept short."""

from __future__ import annotations

import reprlib
import shlex
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 80, 40, 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 4


def shown(value: Any) -> str:
    r"""A value that was found in a file, for an error: as ``repr`` has it, but of bounded length and depth.

    >>> shown("a\nb"), shown(list(range(1000)))
    ("'a\\nb'", '[0, 1, 2, 3, ...]')
    """
    return _SHORT.repr(value)


def shortened(text: str, most: int = 80) -> str:
    """Text as it is, or its beginning and "..." if it is longer than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str) -> str:
    """Text as it is, with control characters other than line breaks spelled out, so that none reaches the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    r"""Text as it is, with all control characters and line breaks spelled out.

    >>> one_line("push\x1b[31m\nit")
    'push\\x1b[31m\\nit'
    """
    return printable(text).replace("\n", "\\n")


def spans(numbers: Iterable[int]) -> str:
    """Numbers as ``vlaflow data drop --episodes`` takes them, such as "3 10-12"; at least one."""
    ordered = sorted(set(numbers))
    breaks = [(before, after) for before, after in pairwise(ordered) if after > before + 1]
    begins, ends = [ordered[0], *(after for _, after in breaks)], [*(before for before, _ in breaks), ordered[-1]]
    return " ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in zip(begins, ends, strict=True))


def as_typed(checkpoint: Path | str | None) -> str:
    """The folder or Hub name of a checkpoint as it is typed in a shell; ``CKPT`` where it is not known."""
    return "CKPT" if checkpoint is None else shlex.quote(str(checkpoint))
