"""What a dataclass's fields may hold, stated in their annotations and checked as soon as there is one.

Ranges of numbers, ``episodes: Count = 20``, and words, ``solver: Literal["euler", "heun"] = "euler"``. NaN is in no range.
Every element of a tuple is checked; None is allowed where the annotation allows it.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Union

from vlaflow.errors import ConfigError, VlaflowError, nearest
from vlaflow.text import shown

BELOW_ONE = math.nextafter(1, 0)
LARGEST = 2**31
"""An upper end that only keeps out absurd numbers, so a refusal of small ones does not mention it."""


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``, both included, or without ``low`` itself.

    Args:
        low, high: the ends; infinite ones are not included.
        above: whether ``low`` is excluded.
    """

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether a finite number lies in it."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def asked(self, number: float) -> str:
        """What a number outside it must be."""
        return f"at least {self.low:.12g}" if self.high == LARGEST and number < self.low else str(self)

    def __str__(self) -> str:
        """In words that follow "must be"."""
        low, high = f"{self.low:.12g}", f"{self.high:.12g}"
        if self.high == BELOW_ONE:
            return f"in [{low}, 1)"
        if self.high == math.inf:
            return f"above {low}" if self.above else f"at least {low}"
        return f"above {low} and at most {high}" if self.above else f"in {low}..{high}"


Count = Annotated[int, Range(1, LARGEST)]
Number = Annotated[int, Range(0, LARGEST)]
Seed = Annotated[int, Range(0, LARGEST)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Fraction = Annotated[float, Range(0, BELOW_ONE)]
"""A share below 1."""
Width = Annotated[int, Range(1, 2**20)]
"""A size of a network or of its input."""
AnyNumber = Annotated[float, "any"]
"""A number that may be infinite or NaN as far as reading goes; the class that has it says more."""


def require_ranges(value: Any, label: str = "{}") -> None:
    """Refuse a dataclass with a number outside the range of its field, or a word that it does not know (``require_words``).

    Args:
        value: instance of a dataclass.
        label: how a field with a number is named in the error; with "--{}", underscores become dashes.

    Raises:
        ConfigError: naming field, range and number, or the nearest word.
    """
    hints = typing.get_type_hints(type(value), include_extras=True)
    for field in dataclasses.fields(value):
        name = field.name.replace("_", "-") if label.startswith("--") else field.name
        found = getattr(value, field.name)
        require_in(found, hints[field.name], label.format(name))
        if label.startswith("--") and dataclasses.is_dataclass(found):  # a group of options
            require_ranges(found, label)
    require_words(value)


def require_in(value: Any, annotation: Any, name: str, error: type[VlaflowError] = ConfigError) -> None:
    """Refuse a number, or a tuple of numbers, outside the ranges in an annotation.

    Raises:
        ConfigError: naming ``name``, range and number; or an error of another class.
    """
    for wanted in _ranges(annotation):
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number not in wanted:
                raise error(f"{name} must be {wanted.asked(number)}, got {shown(number)}.")


def _ranges(annotation: Any) -> list[Range]:
    """The ranges in an annotation, at any depth."""
    found = [each for each in getattr(annotation, "__metadata__", ()) if isinstance(each, Range)]
    return found + [each for inner in typing.get_args(annotation) for each in _ranges(inner)]


def require_words(value: Any) -> None:
    """Refuse a dataclass with a word that its field does not know (``Literal``), also in the dataclasses that it holds.

    Raises:
        ConfigError: naming field and class, with the nearest word.
    """
    for name, words in _words(type(value)):  # type: ignore[arg-type]  # a class is hashable
        found = getattr(value, name)
        if words.refuse(found):
            known = nearest(str(found), map(str, words.known))
            raise ConfigError(f"'{name}' of {type(value).__name__} is {shown(found)}; {known}")
        for inner in found if isinstance(found, tuple) else found.values() if isinstance(found, dict) else (found,):
            if dataclasses.is_dataclass(inner):
                require_words(inner)


@dataclass(frozen=True)
class _Words:
    """The words that a field knows; others are refused where it is a ``Literal`` alone, and strings where it may be more."""

    known: tuple[Any, ...]
    alone: bool

    def refuse(self, found: Any) -> bool:
        return bool(self.known) and found not in self.known and (self.alone or isinstance(found, str))


@lru_cache(maxsize=512)
def _words(kind: type) -> tuple[tuple[str, _Words], ...]:
    """The fields of a dataclass and their words; none where annotations name what only a type checker imports."""
    try:
        hints = typing.get_type_hints(kind)
    except NameError:
        return ()
    return tuple((field.name, _words_in(hints[field.name])) for field in dataclasses.fields(kind))


def _words_in(annotation: Any) -> _Words:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return _Words(args, alone=True)
    if origin not in (Union, types.UnionType) or str in args:
        return _Words((), alone=False)
    return _Words(tuple(word for each in args for word in _words_in(each).known), alone=False)
