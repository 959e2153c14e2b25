"""A calibrated refinement: doubt and threshold, both rounds, what they were measured on, and what they do on other samples.

It lies in the checkpoint folder as ``calibration/refine/NAME.json``, runs as ``refine:NAME`` and is refused for other weights.
It is measured in ``evaluation.refinement``; the thresholds are made in ``doubt_limits``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vlaflow.compute.calibration import FOLDER, load_calibration, require_made_for, with_folder_of
from vlaflow.compute.consensus import Consensus
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import BelowThreshold, Doubt, Spread
from vlaflow.compute.parse import parse
from vlaflow.compute.refine import DRAWS, Refine
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.config import to_json
from vlaflow.errors import ConfigError
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.precision import Dtype
from vlaflow.outputs import write_json
from vlaflow.ranges import Count, NotNegative, Number, Share

DoubtName = Literal["rater", "spread"]
PLACE = Path(FOLDER) / "refine"
"""Folder of the calibrated refinements in that of the checkpoint."""
COMMAND = "vlaflow calibrate CKPT --dataset DIR --refine"
AGAIN = f"Calibrate again: {COMMAND}"


@dataclass(frozen=True)
class RefineShare:
    """The threshold regenerates this share of the executed actions.

    Args:
        share: of them.
    """

    share: Share

    def share_above(self, kept_N: np.ndarray) -> float | None:
        """None: no error is bounded."""
        return None


@dataclass(frozen=True)
class RefineRisk:
    """The threshold bounds the risk of keeping a wrong action; see ``doubt_limits.limit_for_risk``.

    Args:
        max_error: largest error of a kept action: root mean square over its dimensions, normalised.
        risk: largest share of chunks that keep a worse one.
        error: probability that the bound does not hold.
    """

    max_error: NotNegative
    risk: Share
    error: Share

    def share_above(self, kept_N: np.ndarray) -> float | None:
        """Share of the chunks that keep a worse action, given the largest error that each keeps."""
        return float((kept_N > self.max_error).mean())


@dataclass(frozen=True)
class Knowledge:
    """What a doubt knows of the true errors of executed actions.

    Args:
        doubt: its name.
        within: Spearman's rank correlation of score and error within a chunk, mean over chunks.
        overall: the same over all actions.
        auc: probability that an action of the worst quarter has a higher score than another one (area under the ROC curve).
    """

    doubt: str
    within: float
    overall: float
    auc: Share


@dataclass(frozen=True)
class Rival:
    """One way to spend compute on held-out frames.

    Args:
        name: what doubts, or the compute policy.
        settings: of the second round; empty where there is none.
        share: of the executed actions that were regenerated.
        error: mean over episodes of the mean squared error of the executed actions, normalised.
        difference, low, high: to the error of the first round, with a 95 % interval (Student's, over episodes), which a single
            episode does not have: low and high are the difference.
        p50: milliseconds per chunk; None where it was not timed.
    """

    name: str
    settings: str
    share: Share
    error: NotNegative
    difference: float
    low: float
    high: float
    p50: NotNegative | None = None


@dataclass(frozen=True)
class RefineEffect:
    """What the threshold does on samples that it was not made from.

    Args:
        actions: executed ones.
        share: of them that are regenerated.
        draft_error, error: mean squared error before and after, normalised.
        above: share of the chunks that keep an action worse than a risk target's ``max_error``; None for shares.
    """

    actions: Count
    share: Share
    draft_error: NotNegative
    error: NotNegative
    above: Share | None = None


@dataclass(frozen=True)
class RefineCalibration:
    """A refinement and its provenance.

    Args:
        checkpoint, dataset: fingerprints.
        doubt: what doubts.
        threshold: of the doubt, in its units.
        draws: of the spread; 0 for the rater.
        first: compute policy of the first round, as on the command line.
        sampling, clock: of the second round.
        n_action_steps: executed actions, which alone count.
        target: how the threshold was chosen.
        actions: how many executed actions it was chosen from.
        effect: what it does on others.
        knowledge: of every doubt, over all frames.
        rivals: other ways to spend compute, over all frames.
        command, versions: that made it.
        dtype: what the networks computed in.
    """

    checkpoint: str
    dataset: str
    doubt: DoubtName
    threshold: NotNegative
    draws: Number
    first: str
    sampling: Sampling
    clock: Share
    n_action_steps: Count
    target: RefineShare | RefineRisk
    actions: Count
    effect: RefineEffect
    knowledge: tuple[Knowledge, ...]
    rivals: tuple[Rival, ...]
    command: str
    versions: dict[str, str]
    dtype: Dtype = "fp32"

    def require(
        self, where: str, *, checkpoint: str | None = None, dataset: str | None = None, dtype: Dtype | None = None
    ) -> None:
        """Refuse to serve anything else; what is None is not compared.

        Raises:
            CalibrationError: saying what differs and what to do.
        """
        again = with_folder_of(AGAIN, Path(where))
        require_made_for(self, where, again, checkpoint=checkpoint, dataset=dataset, dtype=dtype)

    def refine(self, label: str, knobs: Knobs, checkpoint: Checkpoint | None = None) -> Refine:
        """The compute policy."""
        doubt, inner = doubt_of(self.doubt, self.threshold, self.draws), parse(self.first, knobs.as_measured(), checkpoint)
        executed, waived = self.n_action_steps, knobs.any_training
        return Refine(doubt, self.sampling, inner, self.clock, executed, any_training=waived, alias=label)

    def save(self, file: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(file, to_json(self), finite=True)

    @staticmethod
    def load(file: Path) -> RefineCalibration:
        """Read strictly.

        Raises:
            CalibrationError: there is none, with the nearest name, or it is no JSON.
            ConfigError: for a wrong key or value in it.
        """
        return load_calibration(RefineCalibration, file, COMMAND)


def doubt_of(name: DoubtName, threshold: float, draws: int) -> Doubt:
    """The doubt of that name."""
    return BelowThreshold(threshold) if name == "rater" else Spread(threshold, spread_draws(draws))


def spread_draws(draws: int) -> Consensus:
    """The draws whose spread is the doubt."""
    if draws < 2:
        raise ConfigError(f"A spread needs at least two draws, got {draws}.")
    return Consensus(draws, inner=Dense.by(DRAWS))


def load_refine(name: str, typed: str, knobs: Knobs, checkpoint: Checkpoint) -> Refine:
    """The refinement ``CKPT/calibration/refine/NAME.json``, refused when it was made for other weights or in another dtype."""
    file = checkpoint.folder / PLACE / f"{name}.json"
    found = RefineCalibration.load(file)
    found.require(str(file), checkpoint=checkpoint.fingerprint, dtype=knobs.dtype)
    return found.refine(typed, knobs, checkpoint)
