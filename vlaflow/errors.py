"""Errors that a user can cause and fix: one sentence that says what is wrong, where, and how to fix it.

The command line prints them without a traceback and exits with status 2. Any other exception is a bug in vlaflow
itself and keeps its traceback.
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


class StorageError(DataError):
    """The disk is full, broken or not writable."""

    errno: int | None = None
    strerror: str | None = None


class CheckpointError(VlaflowError):
    """A checkpoint folder is incomplete or damaged, or does not match its config."""


class CalibrationError(VlaflowError):
    """A calibration is missing, damaged, or belongs to another checkpoint or method."""


class DeploymentError(VlaflowError):
    """Compiled programs of a checkpoint are missing or damaged, or were made for something else."""


class ConfigError(VlaflowError):
    """A config, a recipe name or a command-line value is not valid."""


class CapabilityError(VlaflowError):
    """A component, or this machine, does not support what is requested."""


class NotFiniteError(VlaflowError):
    """A network computed NaN or an infinite value."""


class RequestError(VlaflowError):
    """A request or a reply does not follow the real-time protocol."""


class BusyError(VlaflowError):
    """The server cannot accept another request at the moment."""


class DeadlineError(VlaflowError):
    """A request was not computed before its deadline."""


def closest(name: str, options: Iterable[str]) -> str | None:
    """The valid name that is most like a misspelt one; None when nothing is close."""
    return next(iter(difflib.get_close_matches(name[:80], sorted(options), n=1, cutoff=0.5)), None)


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint for a misspelt name: the closest valid one, or the whole list when nothing is close."""
    options = sorted(options)
    close = closest(name, options)
    return f"did you mean '{close}'?" if close else f"valid names: {', '.join(options)}"
