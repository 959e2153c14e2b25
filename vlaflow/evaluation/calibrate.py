"""Calibrating early exits on held-out data, and measuring the error of fixed depths and numbers of steps.

The episodes that training held out are divided in two halves: one determines the thresholds, the other shows their effect. All
depths are evaluated once for every frame, so any number of targets can be tried on one measurement.

Shape letters: N samples, K exits, B batch, L chunk size, D action dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import Stopwatch
from vlaflow.compute.budget import LADDER, Ladder, Rung, exits_of, save
from vlaflow.compute.calibration import FOLDER, Calibration, ExitEffect, RiskTarget, ShareTarget, replaced, require_same
from vlaflow.compute.distance import Metric, distance
from vlaflow.compute.early_exit import EarlyExit, ExitPlan, WarmStart
from vlaflow.compute.sampler_choice import FILE as SAMPLER
from vlaflow.compute.spelling import Checkpoint
from vlaflow.compute.thresholds import (
    Distribution,
    ExitMeasurements,
    exit_shares,
    filtered_quantiles,
    require_finite,
    require_risk,
    risk_controlled,
    taken,
)
from vlaflow.config import from_json
from vlaflow.data.batch import Batch
from vlaflow.data.frame_source import open_few_frames
from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.data.windows import Windows
from vlaflow.errors import CalibrationError, ConfigError, VlaflowError
from vlaflow.flows.sampling import Sampling
from vlaflow.io import read_json
from vlaflow.nn.precision import Dtype
from vlaflow.outputs import require_writable
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import LeftOut, fingerprint, left_out_by, new_episodes, reading_of, trained_on
from vlaflow.progress import progress
from vlaflow.versions import command_line, versions

BATCH = 32
LADDER_STEPS = (1, 2, 3, 5, 10)


class Target(Protocol):
    """Criterion by which thresholds are chosen."""

    def choose(self, table: ExitMeasurements) -> tuple[np.ndarray, ShareTarget | RiskTarget]:
        """Thresholds (K,) from a measurement, and the target as it is recorded."""


@dataclass(frozen=True)
class Sample:
    """Frames to measure on: windows, the chosen rows of them, and which half each belongs to (True: thresholds)."""

    windows: Windows
    index_N: np.ndarray
    choose_N: np.ndarray

    def batches(self) -> Iterator[tuple[Batch, list[Generator]]]:
        """Batches with one generator per frame, which depends on the frame alone."""
        for begin in range(0, len(self.index_N), BATCH):
            index_B = self.index_N[begin : begin + BATCH]
            yield self.windows.batch(index_B), [Generator().manual_seed(int(self.windows.rows[i])) for i in index_B]


@dataclass(frozen=True)
class ByShares:
    """A1's criterion, the share of chunks per exit: see ``thresholds.exit_shares``."""

    distribution: Distribution = "exponential"
    budget: float = 0.4
    first_exit: bool = True

    def choose(self, table: ExitMeasurements) -> tuple[np.ndarray, ShareTarget]:
        """See ``Target``."""
        exits = table.discrepancy_NK.shape[1]
        share_K = exit_shares(self.distribution, self.budget, exits, first_exit=self.first_exit)
        threshold_K = filtered_quantiles(table.discrepancy_NK[table.choose_N], share_K)
        return threshold_K, ShareTarget(self.distribution, self.budget, self.first_exit, tuple(share_K.tolist()))


@dataclass(frozen=True)
class ByRisk:
    """A bound on the risk: see ``thresholds.risk_controlled``."""

    max_deviation: float
    risk: float = 0.1
    error: float = 0.05
    metric: Metric = "max_abs"

    def __post_init__(self) -> None:
        require_risk(self.risk, self.error)

    def choose(self, table: ExitMeasurements) -> tuple[np.ndarray, RiskTarget]:
        """See ``Target``."""
        own = table.choose_N
        threshold_K = risk_controlled(
            table.discrepancy_NK[own],
            table.deviation_NK[own],
            max_deviation=self.max_deviation,
            risk=self.risk,
            error=self.error,
            tuning_N=table.tuning_N[own],
        )
        return threshold_K, RiskTarget(self.max_deviation, self.risk, self.error, self.metric)


@dataclass(frozen=True)
class Request:
    """One calibration of a checkpoint.

    Args:
        name: name of the file ``CKPT/calibration/NAME.json``.
        target: shares or risk.
        depths: depths with an exit; empty for all that were trained.
        metric, sampling, warm_start, restart: see ``ExitPlan``.
        deviation: metric of the deviation from the full depth.
        frames: number of frames to measure, over both halves.
        new_data: the checkpoint was not trained on any episode of the data set.
        ladder: also measure the error of fixed depths and steps, unless that was done before.
        reading: names of the data set's columns and cameras; by default as in the training.
    """

    name: str
    target: Target
    depths: tuple[int, ...] = ()
    metric: Metric = "cosine"
    sampling: Sampling = field(default_factory=lambda: Sampling(2))
    warm_start: WarmStart = "same"
    restart: float = 0.5
    deviation: Metric = "max_abs"
    frames: int = 1024
    new_data: bool = False
    ladder: bool = True
    reading: Reading | None = None


@dataclass(frozen=True)
class Calibrated:
    """A calibration, the measurement it was made from, and its file ``CKPT/calibration/NAME.json``."""

    calibration: Calibration
    table: ExitMeasurements
    file: Path


def run(checkpoint: Path, dataset: Path, request: Request, device: str = "cpu", dtype: Dtype = "fp32") -> Calibrated:
    """Measure, choose thresholds, and write ``CKPT/calibration/NAME.json``.

    Raises:
        VlaflowError: when checkpoint, data and plan do not fit together, or a calibration of another data set or with other
            settings has the name.
    """
    policy, mark = Policy.from_pretrained(checkpoint, device, dtype), fingerprint(checkpoint)
    data = Dataset.open(dataset, reading=request.reading or reading_of(checkpoint, dataset))
    depths = request.depths or policy.model.depths
    if len(policy.model.depths) < 2:
        raise ConfigError(
            f"{checkpoint} was trained with its full depth ({depths[-1]}) as the only exit, so there is nothing to calibrate. "
            "Train it with exits (docs/concepts.md)."
        )
    plan = ExitPlan(depths, request.metric, request.sampling, request.warm_start, request.restart)
    EarlyExit(plan, (inf,) * len(plan.exits)).needs.check(policy.model, "calibration", policy.folder)
    if depths[-1] != policy.model.depths[-1]:
        raise ConfigError(f"The last of the depths must be the full one, {policy.model.depths[-1]}, got {list(depths)}.")
    folder = checkpoint / FOLDER
    file = folder / f"{request.name}.json"
    if file.name in (LADDER, SAMPLER) or file.parent != folder:
        raise ConfigError(f"A calibration cannot be named '{request.name}'; choose another name.")
    if before := replaced(file, Calibration.load, checkpoint=mark, dataset=data.fingerprint, dtype=dtype):
        asked = {f"the target's {name}": value for name, value in vars(request.target).items()}
        found = {name: getattr(before.target, name.removeprefix("the target's "), None) for name in asked}
        require_same(file, vars(before.plan) | found, vars(plan) | asked)
    require_writable(file, file.with_suffix(".html"), cure="Make it writable, or calibrate a copy of the checkpoint.")
    episodes = data.numbers if request.new_data else held_out(checkpoint, data)
    frames = sample(policy, data, episodes, request.frames)
    table = measure(policy, plan, frames, request.deviation)
    made = calibrate(policy, plan, frames, table, target=request.target, checkpoint=mark)
    made.save(file)
    if request.ladder:
        _measure_ladder(policy, frames, Checkpoint(checkpoint, mark))
    return Calibrated(made, table, file)


def _measure_ladder(policy: Policy, frames: Sample, checkpoint: Checkpoint) -> None:
    """Measure the ladder, unless there is one of this checkpoint in this dtype with the steps of all of its early exits."""
    file = checkpoint.folder / FOLDER / LADDER
    exits = exits_of(checkpoint, policy.dtype, damaged=False)
    steps = {*LADDER_STEPS, *(made.plan.sampling.steps for _, made in exits)}
    known: set[tuple[str, Dtype, int]] = set()
    with suppress(VlaflowError):  # one that is not there, or cannot be read, is measured
        found = from_json(Ladder, read_json(file), str(file))
        known = {(found.checkpoint, found.dtype, rung.nfe) for rung in found.rungs}
    wanted = {policy.model.decoder.nfe(Sampling(each)) for each in steps}
    if not {(checkpoint.fingerprint, policy.dtype, nfe) for nfe in wanted} <= known:
        save(ladder(policy, frames, checkpoint.fingerprint, steps), file)


def held_out(folder: Path, dataset: Dataset) -> tuple[int, ...]:
    """The episodes of ``dataset`` on which neither the checkpoint nor one that it continues was trained.

    For a data set of their training, the episodes that it held out; for any other data set, all episodes.

    Raises:
        CalibrationError: the checkpoint does not record this, or training held out fewer than two.
    """
    trained = trained_on(folder)
    if not trained:
        raise CalibrationError(
            f"{folder} lacks training/, so it is unknown which episodes it was trained on. If {dataset.root} is new to it, "
            "pass --episodes all, or name the folder where it was trained."
        )
    held = new_episodes(dataset, trained)
    if len(held) < 2 and any(each.data == dataset.fingerprint for each in trained):
        few = "1 episode" if held else "no episode"
        raise CalibrationError(
            f"Training held out {few} of {dataset.root}, and two are needed. Train with a larger validation_fraction, or use "
            "other data."
        )
    return held


def sample(policy: Policy, dataset: Dataset, episodes: Sequence[int], frames: int, seed: int = 0) -> Sample:
    """Sample frames of the episodes, half of them for the thresholds and half for testing them; no episode is in both halves.

    Actions after an intervention, as the policy's training defined it, do not count.
    Episodes are assigned to the halves alternately, in a random order within each task, so both halves contain every task.
    """
    if len(episodes) < 2 or frames < 4:
        raise ConfigError(f"Calibration needs at least two episodes and four frames, got {len(episodes)} and {frames}.")
    policy.action_spec.require_match(dataset.action_spec or policy.action_spec, "the checkpoint", f"data set {dataset.root}")
    views = policy.views
    area = policy.config.backbone.input_size.area
    found = open_few_frames(dataset, next(iter(views.values())), list(views), area=area)
    left_out = left_out_by(policy.folder)
    if left_out is None and policy.folder is not None:
        sys.stderr.write(
            f"{policy.folder} holds no record of its training, so the default rule leaves out actions after an intervention "
            "(vlaflow.data.quality.InterventionRule).\n"
        )
    left_out = left_out or LeftOut()
    windows = Windows(dataset, found, policy.chunk_size, episodes, intervention_rule=left_out.interventions)
    random = np.random.default_rng(seed)
    by_task: dict[str, list[int]] = {}
    for episode in random.permutation(np.asarray(episodes)).tolist():
        by_task.setdefault(dataset.episode(episode).task, []).append(episode)
    ordered = [episode for task in by_task.values() for episode in task]
    first = set(ordered[::2])
    episode_M = dataset.columns().episode[windows.rows]
    choose_M = np.isin(episode_M, list(first))
    chosen = []
    for half_M in (choose_M, ~choose_M):
        rows = np.flatnonzero(half_M)
        chosen.append(np.sort(random.permutation(rows)[: frames // 2]))
    return Sample(windows, np.concatenate(chosen), np.repeat([True, False], [len(chosen[0]), len(chosen[1])]))


@torch.no_grad()
def measure(policy: Policy, plan: ExitPlan, frames: Sample, metric: Metric = "max_abs", seed: int = 0) -> ExitMeasurements:
    """Evaluate every depth of the plan on every frame."""
    discrepancy, deviation, largest, error = [], [], [], []
    policy.model.eval()
    with progress(len(frames.index_N), "Measuring exits") as bar, policy.precision():
        for samples, generators in frames.batches():
            batch = policy.own_batch(samples)
            chunks = [
                chunk
                for _, chunk in plan.answers(
                    policy.model, policy.embed(batch.observation), generators, Stopwatch(policy.device)
                )
            ]
            target_BLD = policy.targets(batch).action_BLD.to(chunks[0].device)
            weight_BL = batch.valid_BL.to(target_BLD.device).float()
            pairs = list(pairwise(chunks))
            discrepancy.append(torch.stack([distance(plan.metric, later, before) for before, later in pairs], 1))
            deviation.append(torch.stack([distance(metric, chunk, chunks[-1]) for chunk in chunks[1:]], 1))
            largest.append(torch.stack([distance("max_abs", chunk, chunks[-1]) for chunk in chunks[1:]], 1))
            error.append(torch.stack([_error(chunk, target_BLD, weight_BL) for chunk in chunks[1:]], 1))
            bar.advance(len(generators))
    near_NK, far_NK, largest_NK, error_NK = (
        torch.cat(part).double().cpu().numpy() for part in (discrepancy, deviation, largest, error)
    )
    require_finite(near_NK)
    return ExitMeasurements(near_NK, far_NK, largest_NK, error_NK, frames.choose_N, tuning_frames(frames, seed))


def tuning_frames(frames: Sample, seed: int = 0) -> np.ndarray:
    """Frames that define the sequence of thresholds, (N,) bool; the others of their half test it, with other episodes."""
    windows = frames.windows
    episode_N = windows.dataset.columns().episode[windows.rows[frames.index_N]]
    choosing = np.unique(episode_N[frames.choose_N])
    return np.isin(episode_N, np.random.default_rng([seed, 1]).permutation(choosing)[::2])


def calibrate(
    policy: Policy, plan: ExitPlan, frames: Sample, table: ExitMeasurements, *, target: Target, checkpoint: str
) -> Calibration:
    """Choose thresholds, and report their effect on the other half."""
    threshold_K, written = target.choose(table)
    fresh_N = ~table.choose_N
    exit_F = taken(table.discrepancy_NK[fresh_N], threshold_K)
    rows, exits = np.arange(len(exit_F)), len(plan.exits)
    decoder = policy.model.decoder
    each, depth_K = decoder.nfe(plan.sampling), np.asarray(plan.exits)
    answered = [depth * each + decoder.start_passes(depth) for depth in plan.depths]
    spent_K = np.cumsum(answered)[1:] + depth_K
    error_FK = table.error_NK[fresh_N]
    effect = ExitEffect(
        samples=len(exit_F),
        shares=tuple((np.bincount(exit_F, minlength=exits) / len(exit_F)).tolist()),
        layers=float(depth_K[exit_F].mean()),
        layer_passes=float(spent_K[exit_F].mean()),
        nfe=float((exit_F + 2).mean() * each),
        deviation=float(table.largest_NK[fresh_N][rows, exit_F].mean()),
        error=float(np.nanmean(error_FK[rows, exit_F])),
        full_error=float(np.nanmean(error_FK[:, -1])),
        above=written.share_above(table.deviation_NK[fresh_N][rows, exit_F]),
    )
    return Calibration(
        checkpoint=checkpoint,
        dataset=frames.windows.dataset.fingerprint,
        plan=plan,
        thresholds=tuple(None if np.isneginf(t) else float(t) for t in threshold_K[:-1]),
        target=written,
        samples=int(table.choose_N.sum()),
        effect=effect,
        command=command_line(),
        versions=versions(),
        dtype=policy.dtype,
    )


@torch.no_grad()
def ladder(policy: Policy, frames: Sample, checkpoint: str, steps: Collection[int] = LADDER_STEPS) -> Ladder:
    """Error of every fixed depth and number of solver steps, with the same noise as the most expensive of them."""
    model, depths = policy.model, policy.model.depths
    steps = sorted({model.decoder.nfe(Sampling(s)) for s in steps})
    sums = {(depth, s): np.zeros(2) for depth in depths for s in steps}
    count = 0
    with progress(len(frames.index_N), "Measuring steps") as bar, policy.precision():
        for samples, generators in frames.batches():
            batch = policy.own_batch(samples)
            begin = [g.get_state() for g in generators]
            prefixes: dict[int, Prefix] = {}
            prefix = policy.embed(batch.observation)
            for depth in depths:
                prefixes[depth] = prefix = model.read(prefix, depth)
            target_BLD = policy.targets(batch).action_BLD.to(policy.device)
            weight_BL = batch.valid_BL.to(policy.device).float()

            def sampled(depth: int, s: int) -> Tensor:
                for generator, state in zip(generators, begin, strict=True):  # noqa: B023
                    generator.set_state(state)
                return model.decoder.sample(prefixes[depth], generators, Sampling(s))  # noqa: B023

            full_BLD = sampled(depths[-1], steps[-1])
            for depth, s in sums:
                chunk_BLD = sampled(depth, s)
                error_B = _error(chunk_BLD, target_BLD, weight_BL)
                far_B = distance("max_abs", chunk_BLD, full_BLD)
                if not bool(far_B.isfinite().all()):
                    raise ConfigError(
                        "The checkpoint computes chunks that are not finite; train it again with a lower learning rate."
                    )
                sums[depth, s] += (float(far_B.sum()), float(error_B.nan_to_num(0).sum()))  # NaN: no action is valid
            count += len(generators)
            bar.advance(len(generators))
    rungs = tuple(Rung(depth, s, float(far / count), float(error / count)) for (depth, s), (far, error) in sums.items())
    return Ladder(checkpoint, frames.windows.dataset.fingerprint, count, rungs, policy.dtype)


def _error(chunk_BLD: Tensor, target_BLD: Tensor, weight_BL: Tensor) -> Tensor:
    """Mean absolute distance to the demonstration over valid actions, (B,); NaN where no action is valid."""
    return ((chunk_BLD - target_BLD).abs().mean(-1) * weight_BL).sum(1) / weight_BL.sum(1)
