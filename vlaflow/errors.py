"""The errors a user can cause and fix: one sentence that says what is wrong, where, and how to put it right.

The command line prints them without a traceback and exits with status 2. Anything else that is raised is a defect of
vlaflow itself and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlaflowError(Exception):
    """Base of every error that a user can fix."""


class SpecError(VlaflowError):
    """An action, a state or an observation does not mean what the other side expects."""


class DataError(VlaflowError):
    """A data set is missing a file, is damaged, or contradicts itself."""


class CheckpointError(VlaflowError):
    """A checkpoint folder is incomplete, damaged or of another shape than its config says."""


class CalibrationError(VlaflowError):
    """A calibration is missing, damaged, or was made for something else."""


class ConfigError(VlaflowError):
    """A config, a recipe name or a command-line value is not valid."""


class CapabilityError(VlaflowError):
    """A part was asked for something that it, or this machine, cannot do."""


class NotFiniteError(VlaflowError):
    """A network computed NaN or an infinite value."""


class RequestError(VlaflowError):
    """A request or reply in real time is not what the protocol says."""


class BusyError(VlaflowError):
    """The server has no room for another request now."""


class DeadlineError(VlaflowError):
    """A request waited longer than it was worth."""


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint for a misspelt name: the closest valid one, or the whole list when nothing is close."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid names: {', '.join(options)}"
