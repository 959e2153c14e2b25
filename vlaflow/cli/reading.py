"""The options about how a data set is read, shared by all commands that open one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlaflow.ranges import Positive

if TYPE_CHECKING:
    from vlaflow.data.reading import Reading


@dataclass(frozen=True)
class ReadingOptions:
    """For data sets whose columns and cameras do not have LeRobot's names, or whose actions have no stated meaning."""

    key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=COLUMNS")] = ()
    """Columns of the action or the state, e.g. --key action=actions --key state=joints,gripper."""
    view: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME[=COLUMN]")] = ()
    """Use only these cameras, in this order, e.g. --view front=observation.images.top --view wrist."""
    tolerance_s: Annotated[Positive | None, tyro.conf.arg(metavar="S")] = None
    """How far a timestamp may be from its frame, in seconds; by default a quarter of a frame."""

    action_spec: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """What the actions mean, for data sets that do not say so: a file as vlaflow data spec writes it."""

    def reading(self) -> Reading | None:
        """The options as a ``Reading``; None if none was given.

        Raises:
            ConfigError: an option is malformed.
        """
        from vlaflow.data.reading import Reading

        if self == LEROBOT:
            return None
        return Reading.of(self.key, self.view, self.tolerance_s, self.action_spec)


ReadingGroup = Annotated[ReadingOptions, tyro.conf.arg(name="")]
"""As a field of a command's arguments: the options have no prefix."""

LEROBOT = ReadingOptions()
"""No options given: columns and cameras have LeRobot's names."""
