"""The compute policies that a policy knows by name: ``policy.act(observation, compute="exit:adaptive")``.

Names are those of the command line (``vlaflow.compute.parse``). Calibrations and measured times are read from the checkpoint
that the policy was opened from.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlaflow.compute.auto import calibrated
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.dense import Dense
from vlaflow.compute.parse import parse
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.policies.provenance import fingerprint

if TYPE_CHECKING:
    from vlaflow.policies.base import Policy


class Computes:
    """See the module text. Each is made once: a calibration belongs to certain weights, and reading these takes time.

    Args:
        folder: of the checkpoint, or of one of its robots; None for a policy that was not saved yet.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._made: dict[tuple[str | None, Knobs], ComputePolicy] = {}

    def default(self, policy: Policy) -> ComputePolicy:
        """The calibrated sampler, or ``Dense()`` where none was calibrated.

        Raises:
            CalibrationError: for a calibration of other weights.
        """
        key = None, _knobs(policy)
        if key not in self._made:
            found = None if self._folder is None else calibrated(self._folder, fingerprint, key[1])
            self._made[key] = found or Dense()
        return self._made[key]

    def named(self, name: str, policy: Policy) -> ComputePolicy:
        """The compute policy of that name.

        Raises:
            ConfigError: for an unknown or malformed name.
            CalibrationError: for a calibration or measurement that is missing, or of other weights.
        """
        key = name, _knobs(policy)
        if key not in self._made:
            self._made[key] = parse(*key, self._checkpoint)
        return self._made[key]

    @cached_property
    def _checkpoint(self) -> Checkpoint | None:
        return None if self._folder is None else Checkpoint(self._folder, fingerprint(self._folder))


def _knobs(policy: Policy) -> Knobs:
    """What the policy computes with now, which budgets depend on."""
    threads, engine = torch.get_num_threads(), policy.model.engine
    return Knobs(device=str(policy.device), threads=threads, dtype=policy.dtype, engine=engine)
