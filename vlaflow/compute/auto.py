"""``auto``: the compute policy that ``vlaflow calibrate CKPT --sampler`` chose for a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from vlaflow.compute import sampler_choice
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.calibration import FOLDER, with_folder
from vlaflow.compute.parse import parse
from vlaflow.compute.spelling import DEFAULTS, Checkpoint, ComputeKind, Knobs, Spelling
from vlaflow.errors import CalibrationError

logger = logging.getLogger("vlaflow.compute")


def calibrated(folder: Path, fingerprint: Callable[[Path], str], knobs: Knobs = DEFAULTS) -> ComputePolicy | None:
    """The choice for the checkpoint in a folder; None if its sampler was never calibrated.

    Args:
        folder: of the checkpoint.
        fingerprint: of a folder's content; only called if there is a calibration, since it reads all weights.
        knobs: settings.

    Raises:
        CalibrationError: for a calibration of other weights.
    """
    if not (folder / FOLDER / sampler_choice.FILE).exists():
        return None
    checkpoint = Checkpoint(folder, fingerprint(folder))
    found = sampler_choice.load(checkpoint)
    if found is None:
        return None
    if found.dtype != knobs.dtype:
        logger.warning(
            "The sampler of %s was calibrated in %s, and this is %s: its choice holds, its times do not. %s --dtype %s",
            folder,
            found.dtype,
            knobs.dtype,
            with_folder(sampler_choice.AGAIN, folder),
            knobs.dtype,
        )
    return parse(found.choice, knobs.as_measured(), checkpoint)


def default_name(folder: Path) -> str:
    """What a checkpoint is run with unless something else is asked for, as on the command line."""
    return "auto" if (folder / FOLDER / sampler_choice.FILE).exists() else "dense"


def _parse(typed: Spelling) -> ComputePolicy:
    typed.require(usage="auto stands alone.")
    checkpoint = typed.measured()
    found = calibrated(checkpoint.folder, lambda _: checkpoint.fingerprint, typed.knobs)
    if found is None:
        cure = with_folder(sampler_choice.AGAIN, checkpoint.folder)
        raise CalibrationError(f"The sampler of {checkpoint.folder} was not calibrated yet. {cure}")
    return found


AUTO = ComputeKind(_parse)
