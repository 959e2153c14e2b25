"""Calibrating the sampler of a checkpoint (steps, noise scale, temperature, draws, depth) by held-out data or by episodes.

Without an environment every candidate is measured on held-out frames; with one, by episodes and successive halving. Both end in
``CKPT/calibration/sampler.json`` (``compute.sampler_choice``), which ``--compute auto`` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import exp, sqrt
from pathlib import Path

import numpy as np
import torch

from vlaflow.compute.calibration import FOLDER
from vlaflow.compute.parse import distinct, parse
from vlaflow.compute.sampler_choice import FAILURES, FILE, TOLERANCE, Candidate, SamplerCalibration, choose
from vlaflow.config import JSON, to_json
from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.decoders.model import Model
from vlaflow.errors import CalibrationError, CapabilityError
from vlaflow.evaluation.calibrate import BATCH, Sample, held_out, sample
from vlaflow.evaluation.halving import require_episodes
from vlaflow.evaluation.latency import measure as measure_latency
from vlaflow.evaluation.rollout import RolloutConfig, require_fit
from vlaflow.evaluation.sampler_episodes import FIRST_SEED, Observed, Simulation
from vlaflow.evaluation.sampler_measures import CRITERION, SamplerMeasures, measure, plausible_error, two_group_share
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.precision import Dtype
from vlaflow.outputs import require_writable
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import fingerprint, mixed_robots, reading_of
from vlaflow.policies.robots import robot_folder
from vlaflow.simulators.base import expand_env_names, rendering_versions
from vlaflow.spec import Observation
from vlaflow.versions import command_line, device_name, processor, versions

MOST_TWO_GROUPS = 0.1
"""If the draws fall into two groups on a larger share of the frames, means are chosen only with a simulator."""
AVERAGES = "averages draws that fall into two groups"
STEPS = (1, 2, 3, 5, 10)
NOISE_SCALES = (1.0, 0.5, 0.0)
TEMPERATURES = (None, 1.0, 0.0)
DRAWS = (4, 8)
QUICK_FRAMES, QUICK_CHUNKS, QUICK_MS = 96, 10, 60_000.0
"""After training: most frames, timed chunks per candidate, and most milliseconds for single chunks on all frames."""


@dataclass(frozen=True)
class SamplerRequest:
    """One calibration of a sampler.

    Args:
        computes: candidates as on the command line; empty for those of ``candidates``.
        budget_ms: largest 99th percentile of a chunk; None for no limit.
        frames: held-out frames to measure.
        draws: chunks per frame and candidate; with one, only errors and roughness are measured.
        new_data: the checkpoint was not trained on any episode of the data set.
        envs: environments or groups; empty to calibrate on held-out frames alone.
        episodes: of all candidates together, for a calibration in simulation.
        rollout: how episodes are run.
        latency_chunks: chunks timed per candidate.
        workers: processes for episodes.
        fresh: discard what an interrupted calibration in simulation left, instead of continuing it.
        reading: names of the data set's columns and cameras; by default as in the training.
    """

    computes: tuple[str, ...] = ()
    budget_ms: float | None = None
    frames: int = 256
    draws: int = 2
    new_data: bool = False
    envs: tuple[str, ...] = ()
    episodes: int = 1200
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    latency_chunks: int = 20
    workers: int = 1
    fresh: bool = False
    reading: Reading | None = None


def candidates(model: Model) -> list[str]:
    """Ways to sample that this model can run, as on the command line, the cheapest first.

    Steps × noise scales for continuous flows, steps × temperatures and expected tokens for decoders of tokens, deterministic
    steps for discrete flows, means and medoids of several draws of two steps, and two steps at every trained depth.
    """
    decoder = model.decoder
    steps = [s for n, s in enumerate(STEPS) if not n or decoder.nfe(Sampling(s)) != decoder.nfe(Sampling(STEPS[n - 1]))]
    few = min(steps, key=lambda s: abs(s - 2))
    names = [f"dense:{s}@{scale:g}".removesuffix("@1") for s in steps for scale in NOISE_SCALES]
    names += [f"dense:{s},temperature={t:g}" for s in steps for t in TEMPERATURES if t is not None]
    names += [f"dense:{few},expected"]
    names += [f"two-stage:{split}" for split in ("0+1", "0+1,expected", "0+4", "2+2", "2+2,expected", "4+2", "14+2")]
    names += [f"{choice}:{draws}+dense:{few}" for draws in DRAWS for choice in ("mean", "medoid")]
    names += [f"dense:{few},depth={depth}" for depth in model.depths[:-1]]
    found = []
    for name in names:
        compute = parse(name)
        try:
            compute.needs.check(model, name)
        except CapabilityError:
            continue
        found.append(name)
    return found


def run(
    checkpoint: Path,
    dataset: Path,
    request: SamplerRequest,
    device: str = "cpu",
    dtype: Dtype = "fp32",
    *,
    report: Callable[[SamplerCalibration, Path], object] | None = None,
) -> SamplerCalibration:
    """Measure every candidate, choose one, and write ``CKPT/calibration/sampler.json``.

    Args:
        checkpoint: folder of a policy.
        dataset: LeRobot data set whose held-out episodes are measured.
        request: what to measure.
        device, dtype: where the networks run, and what they compute in.
        report: writes a page; called with the calibration and the path of the page before finished episodes are discarded.

    Raises:
        VlaflowError: when checkpoint, data, environments and candidates do not fit together, or nothing fits the budget.
    """
    policy, mark = Policy.from_pretrained(checkpoint, device, dtype), fingerprint(checkpoint)
    data = Dataset.open(dataset, reading=request.reading or reading_of(checkpoint, dataset))
    typed = distinct(request.computes or candidates(policy.model))
    names, computes = list(typed), list(typed.values())
    for compute in computes:
        compute.needs.check(policy.model, compute.name, policy.folder)
    envs = tuple(expand_env_names(request.envs))
    n_action_steps = request.rollout.n_action_steps or policy.n_action_steps
    rollout = replace(request.rollout, device=device, dtype=dtype, n_action_steps=n_action_steps)
    if envs:
        require_fit(policy, str(checkpoint), set(envs), computes, rollout)
        if request.budget_ms is None:  # else only those that fit the budget play
            require_episodes(len(computes), request.episodes, len(envs))
    file = checkpoint / FOLDER / FILE
    require_writable(file, file.with_suffix(".html"), cure="Make it writable, or calibrate a copy of the checkpoint.")

    episodes = data.numbers if request.new_data else held_out(checkpoint, data)
    frames = sample(policy, data, episodes, request.frames)

    def observed() -> tuple[Observed, list[SamplerMeasures]]:
        measures, _ = measure(policy, computes, frames, n_action_steps=n_action_steps, draws=request.draws)
        times = measure_latency(policy, computes, _observations(frames, request.latency_chunks), request.latency_chunks)
        measured = [
            Candidate(name, each.nfe, each.layer_passes, time.total.p50, time.total.p99, 0.0, measures=each.means())
            for name, each, time in zip(names, measures, times, strict=True)
        ]
        return Observed(tuple(measured), two_group_share(policy, parse("dense"), frames)), measures

    simulation = None
    if envs:
        settings: dict[str, JSON] = {
            "checkpoint": mark,
            "dataset": data.fingerprint,
            "candidates": names,
            "envs": list(envs),
            "rollouts": request.episodes,
            "budget_ms": request.budget_ms,
            "frames": request.frames,
            "rollout": to_json(rollout),
            "machine": processor(),
            "versions": versions() | rendering_versions(envs, rollout.render),
        }
        folder = checkpoint / FOLDER / "sampler-episodes"
        simulation = Simulation(checkpoint, computes, envs, rollout, request.workers, folder, settings)
        on_frames = simulation.begin(lambda: observed()[0], fresh=request.fresh)
        scored, seeds = simulation.score(on_frames.candidates, request.budget_ms, request.episodes)
    else:
        on_frames, measures = observed()
        scored, seeds = _by_frames(on_frames.candidates, measures, frames), 0
        if on_frames.two_groups > MOST_TWO_GROUPS:
            scored = [replace(each, reason=AVERAGES) if c.averages else each for each, c in zip(scored, computes, strict=True)]
    made = SamplerCalibration(
        checkpoint=mark,
        dataset=data.fingerprint,
        criterion=FAILURES if envs else CRITERION,
        candidates=tuple(scored),
        choice=choose(scored, request.budget_ms, 0.0 if envs else TOLERANCE).compute,
        budget_ms=request.budget_ms,
        frames=len(frames.index_N),
        envs=envs,
        first_seed=FIRST_SEED,
        seeds=seeds,
        two_groups=on_frames.two_groups,
        machine=processor(),
        device=device_name(device),
        threads=1,
        command=command_line(),
        versions=versions(),
        dtype=dtype,
    )
    made.save(file)
    if report is not None:
        report(made, file.with_suffix(".html"))
    if simulation is not None:
        simulation.close()
    return made


def after_training(checkpoint: Path, datasets: Sequence[str | Path], device: str | None = None) -> list[str]:
    """Calibrate a fresh checkpoint on as many held-out frames as fit into about a minute; returns sentences about it.

    Of several robots each is calibrated on the first of its data sets, in an equal share of the minute. A checkpoint without
    held-out episodes, or too slow for this, stays without a calibration.

    Args:
        checkpoint: what was trained.
        datasets: on these data sets, in their order.
        device: where the networks run; a GPU where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    robots = mixed_robots(checkpoint)
    if not robots:
        return [_calibrated_quickly(checkpoint, Path(datasets[0]), device, QUICK_MS)]
    first = dict(reversed([*zip(robots, datasets, strict=True)]))
    share = QUICK_MS / len(first)
    return [
        f"{robot}: {_calibrated_quickly(robot_folder(checkpoint, robot), Path(first[robot]), device, share)}"
        for robot in dict.fromkeys(robots)
    ]


def _calibrated_quickly(checkpoint: Path, dataset: Path, device: str, milliseconds: float) -> str:
    """``after_training`` of one robot; a sentence about it."""
    policy, data = Policy.from_pretrained(checkpoint, device), Dataset.open(dataset, reading=reading_of(checkpoint, dataset))
    try:
        frames = sample(policy, data, held_out(checkpoint, data), QUICK_FRAMES)
        names = tuple(candidates(policy.model))
        times = measure_latency(policy, [parse(name) for name in names], _observations(frames, 2), 2, warm_up=1)
        count = min(QUICK_FRAMES, int(milliseconds / sum(time.mean for time in times)))
        if count < BATCH:
            return (
                "The sampler was not calibrated, which would take more than a minute here. To do it: vlaflow calibrate "
                f"{checkpoint} --dataset {dataset} --sampler"
            )
        request = SamplerRequest(names, frames=count, draws=1, latency_chunks=QUICK_CHUNKS)
        made = run(checkpoint, dataset, request, device)
    except CalibrationError as reason:
        return f"The sampler was not calibrated: {reason}"
    chosen = made.chosen
    return f"Calibrated the sampler on {made.frames} held-out frames: {chosen.compute}, {chosen.p50:.1f} ms per chunk."


def _observations(frames: Sample, count: int) -> list[Observation]:
    """Some of the frames, spread evenly."""
    windows = frames.windows
    index_N = frames.index_N[np.linspace(0, len(frames.index_N) - 1, min(count, len(frames.index_N))).astype(int)]
    return windows.batch(index_N).observation.split()


def _by_frames(found: Sequence[Candidate], measures: Sequence[SamplerMeasures], frames: Sample) -> list[Candidate]:
    """With scores by ``CRITERION``, and standard errors of the paired log ratios over held-out episodes."""
    episode_N = frames.windows.dataset.columns().episode[frames.windows.rows[frames.index_N]]
    log_E = [plausible_error(each, episode_N) for each in measures]
    mean = [float(np.nanmean(each)) for each in log_E]
    best = int(np.argmin(mean))
    scored = []
    for number, candidate in enumerate(found):
        behind_E = log_E[number] - log_E[best]
        behind_E = behind_E[np.isfinite(behind_E)]
        error = float(behind_E.std(ddof=1) / sqrt(len(behind_E))) if len(behind_E) > 1 else 0.0
        scored.append(replace(candidate, score=exp(mean[number]), behind=mean[number] - mean[best], standard_error=error))
    return scored
