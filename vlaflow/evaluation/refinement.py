"""Calibrating a refinement on held-out data: the threshold of its doubt, and a table of what it and its rivals bring.

Measured are the errors of the actions that would be executed (``refinement_measures``). A smaller error is not more success
(docs/sampling.md): the table says what a doubt is worth, an evaluation whether it helps.

Shape letters: N frames, L chunk size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from vlaflow.compute.auto import default_name
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.calibration import replaced, require_same
from vlaflow.compute.doubt_calibration import (
    PLACE,
    DoubtName,
    RefineCalibration,
    RefineEffect,
    RefineRisk,
    RefineShare,
    Rival,
    doubt_of,
    spread_draws,
)
from vlaflow.compute.doubt_limits import limit_for_risk, limit_for_share
from vlaflow.compute.doubts import AtRandom, BelowThreshold, Spread
from vlaflow.compute.parse import parse
from vlaflow.compute.refine import Refine
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.compute.thresholds import require_risk
from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.errors import ConfigError
from vlaflow.evaluation.calibrate import held_out, sample
from vlaflow.evaluation.latency import measure as measure_latency
from vlaflow.evaluation.refinement_measures import RANDOM, RATER, SPREAD, Drafts, Workbench
from vlaflow.evaluation.statistics import student
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.precision import Dtype
from vlaflow.outputs import require_writable
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import fingerprint, reading_of
from vlaflow.versions import command_line, versions

SHARES = (0.125, 0.25, 0.5)
"""Of regenerated actions, in the table of rivals; all of them is a row of its own."""
CLOCKS, STEPS = (1.0, 0.5, 0.25), (1, 2, 5)
"""Of second rounds that are tried at the calibrated share."""
CONSENSUS = (2, 4, 8)
"""Draws of the consensus in the table: as many as take no longer than the refinement, or else the fewest."""
TIMED = 12
"""Chunks per compute policy."""


class RefineTarget(Protocol):
    """Criterion by which the limit is chosen."""

    def limit(self, table: Drafts, score_NL: np.ndarray) -> tuple[float, RefineShare | RefineRisk]:
        """Limit of the scores, from the half that thresholds are made from, and the target as it is recorded."""


@dataclass(frozen=True)
class ByRegenerated:
    """Regenerate this share of the executed actions."""

    share: float = 0.25

    def limit(self, table: Drafts, score_NL: np.ndarray) -> tuple[float, RefineShare]:
        """See ``RefineTarget``."""
        own_NL = table.counts_NL & table.choose_N[:, None]
        return limit_for_share(score_NL[own_NL], self.share), RefineShare(self.share)


@dataclass(frozen=True)
class ByKeptError:
    """Let at most a share ``risk`` of the chunks keep an action whose error exceeds ``max_error``; see ``RefineRisk``."""

    max_error: float
    risk: float = 0.1
    error: float = 0.05

    def __post_init__(self) -> None:
        require_risk(self.risk, self.error)

    def limit(self, table: Drafts, score_NL: np.ndarray) -> tuple[float, RefineRisk]:
        """See ``RefineTarget``."""
        own = table.choose_N
        found = limit_for_risk(
            score_NL[own],
            np.sqrt(table.error_NL[own]),
            table.counts_NL[own],
            max_error=self.max_error,
            risk=self.risk,
            error=self.error,
            tuning_N=table.tuning_N[own],
        )
        return found, RefineRisk(self.max_error, self.risk, self.error)


@dataclass(frozen=True)
class RefineRequest:
    """One calibration of a refinement.

    Args:
        name: of the file ``CKPT/calibration/refine/NAME.json``.
        target: share or risk.
        doubt: which the threshold is of.
        draws: of the spread.
        first: compute policy of the first round; empty for the calibrated sampler, or dense.
        sampling: of the second round; None for that of the first one where it is dense.
        clock: see ``Refine``.
        n_action_steps: executed actions; None for the checkpoint's.
        frames: to measure, over both halves.
        new_data: the checkpoint was not trained on any episode of the data set.
        reading: names of the data set's columns and cameras; by default as in the training.
    """

    name: str
    target: RefineTarget = field(default_factory=ByRegenerated)
    doubt: DoubtName = "rater"
    draws: int = 8
    first: str = ""
    sampling: Sampling | None = None
    clock: float = 1.0
    n_action_steps: int | None = None
    frames: int = 512
    new_data: bool = False
    reading: Reading | None = None


@dataclass(frozen=True)
class Refined:
    """A calibration, the measurement it was made from, and its file."""

    calibration: RefineCalibration
    drafts: Drafts
    file: Path


def run(checkpoint: Path, dataset: Path, request: RefineRequest, device: str = "cpu", dtype: Dtype = "fp32") -> Refined:
    """Measure, choose the threshold, and write ``CKPT/calibration/refine/NAME.json``.

    Raises:
        VlaflowError: checkpoint, data and request do not fit together, or a calibration of another data set or with other
            settings has the name.
    """
    policy, mark = Policy.from_pretrained(checkpoint, device, dtype), fingerprint(checkpoint)
    data = Dataset.open(dataset, reading=request.reading or reading_of(checkpoint, dataset))
    if not request.name[:1].isalpha() or "=" in request.name or "+" in request.name:
        raise ConfigError(
            f"A calibrated refinement has a name that begins with a letter, without = and +, not {request.name!r}."
        )
    file = checkpoint / PLACE / f"{request.name}.json"
    if file.parent != checkpoint / PLACE:
        raise ConfigError(f"A calibration cannot be named '{request.name}'; choose another name.")
    require_writable(file, file.with_suffix(".html"), cure="Make it writable, or calibrate a copy of the checkpoint.")
    knobs = Knobs(device=device, dtype=dtype)
    first = _first_round(request.first or default_name(checkpoint), knobs, Checkpoint(checkpoint, mark))
    doubt = doubt_of(request.doubt, 0.0, request.draws)
    steps = request.n_action_steps or policy.n_action_steps
    refine = Refine(doubt, second_round(request.sampling, first), first, request.clock, steps)
    refine.needs.check(policy.model, "calibration", policy.folder)
    if before := replaced(file, RefineCalibration.load, checkpoint=mark, dataset=data.fingerprint, dtype=dtype):
        draws = request.draws if request.doubt == SPREAD else 0
        asked = {
            "doubt": request.doubt,
            "draws": draws,
            "first": first.name,
            "sampling": refine.sampling,
            "clock": refine.clock,
        }
        asked |= {"n_action_steps": steps, **vars(request.target)}
        require_same(file, vars(before.target) | vars(before), asked)
    episodes = data.numbers if request.new_data else held_out(checkpoint, data)
    frames = sample(policy, data, episodes, request.frames)
    doubts = {RATER: BelowThreshold(), SPREAD: Spread(0.0, spread_draws(request.draws)), RANDOM: AtRandom()}
    work = Workbench(policy, frames, refine, doubts)
    drafts = work.drafts()
    limit, target = request.target.limit(drafts, drafts.score_NL[request.doubt])
    threshold = min(-limit, 1.0) if request.doubt == RATER else max(limit, 0.0)
    refine = replace(refine, doubt=doubt_of(request.doubt, threshold, request.draws))
    made = RefineCalibration(
        checkpoint=mark,
        dataset=data.fingerprint,
        doubt=request.doubt,
        threshold=threshold,
        draws=request.draws if request.doubt == SPREAD else 0,
        first=first.name,
        sampling=refine.sampling,
        clock=refine.clock,
        n_action_steps=steps,
        target=target,
        actions=int(drafts.counts_NL[drafts.choose_N].sum()),
        effect=_effect(work, drafts, limit, request.doubt, target),
        knowledge=drafts.knowledge(),
        rivals=tuple(rivals(work, drafts, refine, limit, request.doubt)),
        command=command_line(),
        versions=versions(),
        dtype=dtype,
    )
    made.save(file)
    return Refined(made, drafts, file)


def _first_round(typed: str, knobs: Knobs, checkpoint: Checkpoint) -> ComputePolicy:
    """The compute policy; a calibration names it, so it must be what its name says."""
    first = parse(typed, knobs, checkpoint)
    with suppress(ConfigError):
        if parse(first.name, knobs, checkpoint) == first:
            return first
    raise ConfigError(f"A calibrated refinement begins with a sampler, as in --compute dense:2 or mean:4, not with '{typed}'.")


def second_round(asked: Sampling | None, first: ComputePolicy) -> Sampling:
    """Settings of the second round: those asked for, or those of a first round at full depth, or two steps."""
    if asked is not None:
        return asked
    return Sampling(2) if first.stages is None else first.stages.sampling


def rivals(work: Workbench, drafts: Drafts, refine: Refine, limit: float, doubt: str) -> Iterator[Rival]:
    """The table: doubts at equal shares, other second rounds at the calibrated threshold, and other ways to spend the time."""
    counts_NL, first = drafts.counts_NL, refine.inner
    chosen_NL = counts_NL & (drafts.score_NL[doubt] > limit)
    few = [parse(f"{how}:{k}+dense:2") for how in ("mean", "medoid") for k in CONSENSUS]
    times = _times(work, [first, refine, *few])
    calibrated = f"{doubt}, calibrated"

    def regenerated(name: str, doubted_NL: np.ndarray, how: Refine) -> Rival:
        share = float(doubted_NL.sum() / counts_NL.sum())
        p50 = times[refine.name] if name == calibrated and how == refine else None
        settings = f"{how.sampling}, clock {how.clock:g}"
        return compared(drafts, work.regenerated(doubted_NL, how), Rival(name, settings, share, 0, 0, 0, 0, p50))

    def sampled(compute: ComputePolicy) -> Rival:
        error_NL = drafts.error_NL if compute == first else work.sampled(compute)
        return compared(drafts, error_NL, Rival(compute.name, "", 0, 0, 0, 0, 0, times[compute.name]))

    yield sampled(first)
    for name, score_NL in drafts.score_NL.items():
        for share in SHARES:
            yield regenerated(name, counts_NL & (score_NL > limit_for_share(score_NL[counts_NL], share)), refine)
    yield regenerated("all actions", counts_NL, refine)
    samplings = [refine.sampling, *(replace(refine.sampling, steps=steps, grid=None) for steps in STEPS)]
    for sampling in dict.fromkeys(samplings):
        for clock in dict.fromkeys((refine.clock, *CLOCKS)):
            yield regenerated(calibrated, chosen_NL, replace(refine, sampling=sampling, clock=clock))
    for how in ("mean", "medoid"):
        own = [compute for compute in few if compute.name.startswith(how)]  # the fewest draws first
        fitting = [compute for compute in own if times[compute.name] <= times[refine.name]]
        yield sampled(fitting[-1] if fitting else own[0])


def compared(drafts: Drafts, error_NL: np.ndarray, row: Rival) -> Rival:
    """The row with the mean of these errors, and its paired difference to the drafts'.

    Episodes count alike, because frames of one episode are alike.
    """
    masks = [drafts.counts_NL & (drafts.episode_N == episode)[:, None] for episode in np.unique(drafts.episode_N)]
    own = [mask_NL for mask_NL in masks if mask_NL.any()]
    errors = [float(error_NL[mask_NL].mean()) for mask_NL in own]
    moved = [error - float(drafts.error_NL[mask_NL].mean()) for error, mask_NL in zip(errors, own, strict=True)]
    interval = student(moved)
    return replace(row, error=float(np.mean(errors)), difference=float(np.mean(moved)), low=interval.low, high=interval.high)


def _times(work: Workbench, computes: Sequence[ComputePolicy]) -> dict[str, float]:
    """Median milliseconds of a chunk by the name of the compute policy."""
    windows, index_N = work.frames.windows, work.frames.index_N
    picked_N = index_N[np.linspace(0, len(index_N) - 1, min(TIMED, len(index_N))).astype(int)]
    observations = windows.batch(picked_N).observation.split()
    return {each.compute: each.total.p50 for each in measure_latency(work.policy, computes, observations, TIMED)}


def _effect(work: Workbench, drafts: Drafts, limit: float, doubt: str, target: RefineShare | RefineRisk) -> RefineEffect:
    """What the limit does on the other half."""
    fresh_NL = drafts.counts_NL & ~drafts.choose_N[:, None]
    doubted_NL = drafts.counts_NL & (drafts.score_NL[doubt] > limit)
    error_NL = work.regenerated(doubted_NL, work.refine)
    kept_NL = np.where(fresh_NL & ~doubted_NL, np.sqrt(drafts.error_NL), 0.0)
    return RefineEffect(
        int(fresh_NL.sum()),
        float(doubted_NL[fresh_NL].mean()),
        float(drafts.error_NL[fresh_NL].mean()),
        float(error_NL[fresh_NL].mean()),
        target.share_above(kept_NL[~drafts.choose_N].max(1)),
    )
