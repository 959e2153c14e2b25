"""A console for text that others wrote, such as instructions and names of a data set."""

from __future__ import annotations

from typing import Any

from vlaflow.text import printable


def plain_console(*, stderr: bool = False) -> Any:
    """One of rich that shows such text unchanged, brackets and colons included; control characters are spelled out."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    return PlainConsole(markup=False, emoji=False, stderr=stderr)
