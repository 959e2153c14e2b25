"""Files that others wrote, read strictly; each refusal is one sentence with file and field.

    info = read_object(root / "meta/info.json", DataError, "copy it again.", finite=True)
    require_form(InfoForm, info, str(path), DataError)           # types and ranges of the fields that ``InfoForm`` names

Three things are checked in this order. The *text*: size, UTF-8, JSON without repeated keys and not nested too deep.
The *form*: a dataclass says which fields there are, of which types and in which ranges (``config.from_json`` for files of ours,
where an unknown key is an error; ``require_form`` for files of others, which may say more than is read). The *meaning*: the
reader of the file compares it with others. Templates of paths are parsed here as well (``fill``), never formatted. Headers of
safetensors files are read by ``io``, tables by ``data.tables``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlaflow.config import JsonSource, decode
from vlaflow.errors import VlaflowError
from vlaflow.text import one_line, shown

MOST_DEPTH = 64
"""Deepest nesting of lists and objects in a file."""
MOST_BYTES = 64 * 2**20
"""Largest size of a file that describes something."""
MOST_LISTED = 2**32
"""Largest size of a file that lists samples, such as a million questions."""
MOST_DIGITS = 20
"""Widest number in the template of a path."""

MOST_NAME = 255
"""Longest name of a file or folder, in bytes, on the file systems that there are."""

_FIELD = re.compile(r"\{(\w+)(?::(0?)(\d*)d?)?\}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_bytes(file: Path, error: type[VlaflowError], cure: str, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a file, refused unread where it is larger than such files are.

    Args:
        file: an ordinary file.
        error: class of the error.
        cure: the rest of the sentence about a missing or damaged file, and what to do.
        most_bytes: largest size.
    """
    try:
        if not file.is_file():
            raise error(f"{file} is {'no file' if file.exists() else 'missing'}; {cure}")
        size = file.stat().st_size
        if size > most_bytes:
            raise error(f"{file} has {size} bytes; at most {most_bytes} are read; {cure}")
        return file.read_bytes()
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        raise error(f"{file} cannot be read ({getattr(problem, 'strerror', None) or problem}); {cure}") from problem


def parse(content: bytes, where: str, error: type[VlaflowError], cure: str, *, finite: bool = False) -> Any:
    """Parse JSON: UTF-8, no key twice in an object, nested at most ``MOST_DEPTH`` deep.

    Args:
        content: the text.
        where: file, or file and line, for the error.
        error: class of the error.
        cure: the rest of the sentence.
        finite: whether NaN and infinities, which JSON does not have but Python writes, are refused.
    """
    try:
        text = content.decode("utf-8")
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_constant if finite else None)
        if content.count(b"[") + content.count(b"{") > MOST_DEPTH and _depth(found) > MOST_DEPTH:
            raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
        if _SURROGATE.search(content):
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        if finite and (b"e" in content or b"E" in content):
            json.dumps(found, allow_nan=False)  # 1e999 is an infinity
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not UTF-8 (byte {problem.start}); {cure}") from problem
    except json.JSONDecodeError as problem:
        raise error(f"{where} is not valid JSON ({one_line(str(problem))}); {cure}") from problem
    except (ValueError, RecursionError) as problem:  # also text that is not UTF-8, and numbers of thousands of digits
        reason = "it is nested too deep" if isinstance(problem, RecursionError) else one_line(str(problem))
        raise error(f"{where} is not valid JSON ({reason:.300}); {cure}") from problem
    return found


def read_json(file: Path, error: type[VlaflowError], cure: str, *, finite: bool = False, most_bytes: int = MOST_BYTES) -> Any:
    """Read a JSON file; see ``parse``."""
    return parse(read_bytes(file, error, cure, most_bytes), str(file), error, cure, finite=finite)


def read_object(file: Path, error: type[VlaflowError], cure: str, *, finite: bool = False) -> dict[str, Any]:
    """Read a JSON file that must be an object; see ``parse``."""
    return as_object(read_json(file, error, cure, finite=finite), str(file), error, cure)


def as_object(found: Any, where: str, error: type[VlaflowError], cure: str) -> dict[str, Any]:
    """What was parsed, refused unless it is an object."""
    if not isinstance(found, dict):
        raise error(f"{where} contains a {type(found).__name__} instead of an object; {cure}")
    return found


def read_lines(
    file: Path, error: type[VlaflowError], cure: str, *, finite: bool = False, most_bytes: int = MOST_LISTED
) -> Iterator[tuple[str, Any]]:
    """Yield the JSON value of every line that is not empty, each with "FILE, line N"; see ``parse``."""
    content = read_bytes(file, error, cure, most_bytes)
    for number, line in enumerate(content.split(b"\n"), 1):  # splitlines would also cut inside a JSON text
        if line.strip():
            where = f"{file}, line {number}"
            yield where, parse(line, where, error, cure, finite=finite)


def require_form(form: type, found: Any, where: str, error: type[VlaflowError], key: str = "") -> None:
    """Refuse JSON whose fields are not of the types and in the ranges that a dataclass states; other fields are ignored.

    Args:
        form: frozen dataclass; fields with a default may be missing.
        found: what was parsed.
        where: file, or file and line, for the error.
        error: class of the error.
        key: of ``found`` in the file, where it is a part of it.
    """
    decode(form, found, JsonSource(where, error, others=True), key)


def fill(template: Any, values: Mapping[str, Any]) -> str:
    """Fill in the template of a path: {name}, {name:d} or {name:03d}, and nothing else of Python's formats.

    Args:
        template: as found in a file.
        values: by name, whole numbers and texts; a text takes no format.

    Raises:
        ValueError: saying what it contains instead.
    """
    if not isinstance(template, str):
        raise ValueError("it is no text")

    def value(found: re.Match[str]) -> str:
        name, zero, digits = found.groups()
        if name not in values:
            raise ValueError(f"nothing is named {shown(name)}")
        number = values[name]
        if isinstance(number, str):
            if found[0] != f"{{{name}}}":
                raise ValueError(f"'{name}' is a text and cannot be written as {shown(found[0])}")
            return number
        if type(number) is not int:
            raise ValueError(f"'{name}' is {shown(number)}, no whole number")
        if int(digits or 0) > MOST_DIGITS:
            raise ValueError(f"{shown(found[0])} has more than {MOST_DIGITS} digits")
        return f"{number:{zero}{digits}d}" if digits else str(number)

    if any(brace in _FIELD.sub("", template) for brace in "{}"):
        raise ValueError("a brace is not part of a field such as {name} or {name:03d}")
    path = _FIELD.sub(value, template)
    if "\0" in path or max(len(part.encode()) for part in path.split("/")) > MOST_NAME:
        raise ValueError("it gives a name that no file can have")
    return path


def is_file(path: Path) -> bool:
    """Whether there is an ordinary file; a name that is too long for the system is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def finite_number(found: Any) -> bool:
    """Whether a JSON value is a number that fits a float."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        return False
    try:
        return math.isfinite(float(found))
    except OverflowError:  # an integer of 400 digits
        return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} occurs twice in an object")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"it contains {name}, which is no number")


def _depth(found: Any) -> int:
    """How deep containers are nested, counted up to one more than is allowed."""
    level, depth = [found] if isinstance(found, dict | list) else [], 0
    while level and depth <= MOST_DEPTH:
        depth += 1
        inner = (value for node in level for value in (node.values() if isinstance(node, dict) else node))
        level = [value for value in inner if type(value) is dict or type(value) is list]
    return depth
