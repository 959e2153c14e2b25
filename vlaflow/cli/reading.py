"""The options about how a data set is read, shared by all commands that open one.

    --key action=actions                         holds for every data set of the command
    --key arms:action=actions                    holds for the one called "arms"

What is said of one data set goes before what is said of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlaflow.errors import ConfigError, nearest

if TYPE_CHECKING:
    from vlaflow.data.reading import Reading
    from vlaflow.data.weights import DatasetEntry


@dataclass(frozen=True)
class ReadingOptions:
    """For data sets whose columns and cameras do not have LeRobot's names, or whose actions have no stated meaning.

    In a command with several data sets, a data set's name and a colon before the value make an option hold for that one alone:
    --key arms:action=actions
    """

    key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=COLUMNS")] = ()
    """Columns of the action or the state, e.g. --key action=actions --key state=joints,gripper."""
    view: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME[=COLUMN]")] = ()
    """Use only these cameras, in this order, e.g. --view front=observation.images.top --view wrist."""
    tolerance_s: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="S")] = ()
    """How far a timestamp may be from its frame, in seconds; by default a quarter of a frame."""

    action_spec: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    """What the actions mean, for data sets that do not say so: a file as vlaflow data spec writes it."""

    def reading(self) -> Reading | None:
        """The options of a command with one data set as a ``Reading``; None if none was given.

        Raises:
            ConfigError: an option is malformed.
        """
        return self._of(None, ())

    def of_entries(self, entries: Sequence[DatasetEntry]) -> list[DatasetEntry]:
        """Data sets with what the options say of each.

        Raises:
            ConfigError: an option is malformed, or names none of them.
        """
        names = dict.fromkeys(entry.name for entry in entries)
        return [replace(entry, reading=self._of(entry.name, tuple(names))) for entry in entries]

    def _of(self, name: str | None, names: Sequence[str]) -> Reading | None:
        """What is said of all data sets and of the one with this name, out of ``names``."""
        if self == LEROBOT:
            return None
        addressed = {option: [_addressed(option, text, names) for text in texts] for option, texts in self._texts.items()}
        general, own = (
            _reading(*([text for one, text in addressed[option] if one == whom] for option in self._texts))
            for whom in (None, name)
        )
        found = general if name is None else own.before(general)
        return None if found == _reading([], [], [], []) else found

    @property
    def _texts(self) -> dict[str, tuple[str, ...]]:
        return {"--key": self.key, "--view": self.view, "--tolerance-s": self.tolerance_s, "--action-spec": self.action_spec}


def _addressed(option: str, text: str, names: Sequence[str]) -> tuple[str | None, str]:
    """The data set that an option's value is about (None: all of them), and the value."""
    before, colon, after = text.partition(":")
    if not colon or "=" in before or Path(text).exists():
        return None, text
    if not names:
        raise ConfigError(
            f"{option} {text} is about a data set '{before}', but this command reads one; write {option} {after}."
        )
    if before not in names:
        raise ConfigError(f"{option} {text} is about a data set '{before}', which is not given; {nearest(before, names)}")
    return before, after


def _reading(keys: Sequence[str], views: Sequence[str], tolerances: Sequence[str], specs: Sequence[str]) -> Reading:
    from vlaflow.data.reading import Reading

    for option, texts in (("--tolerance-s", tolerances), ("--action-spec", specs)):
        if len(texts) > 1:
            raise ConfigError(f"{option} is given twice for the same data set ({', '.join(texts)}); give it once.")
    try:
        tolerance = float(tolerances[0]) if tolerances else None
    except ValueError:
        raise ConfigError(f"--tolerance-s is a positive number of seconds, got '{tolerances[0]}'.") from None
    return Reading.of(keys, views, tolerance, Path(specs[0]) if specs else None)


ReadingGroup = Annotated[ReadingOptions, tyro.conf.arg(name="")]
"""As a field of a command's arguments: the options have no prefix."""

LEROBOT = ReadingOptions()
"""No options given: columns and cameras have LeRobot's names."""
