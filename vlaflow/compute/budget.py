"""The best that fits so many milliseconds: depth, solver steps or early exit, by measured time and measured loss.

Where the sampler was calibrated on this machine (``vlaflow calibrate CKPT --sampler``), its candidates are compared: steps,
noise scales, draws, depths. Otherwise a fixed depth and number of steps is chosen, by what it loses (``Ladder``). Calibrated
early exits compete in both cases, if the parts of a chunk were timed here (``Profile``, by ``vlaflow bench latency CKPT``).
What must fit is the 99th percentile of the worst case: an early exit counts with all of its depths. Times are those of the
engine that computes; a sampler's, which were measured eagerly, are converted by the fitted costs of both engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any, TypeVar

from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.calibration import FOLDER, Calibration, naming
from vlaflow.compute.cost import ChunkWork, CostModel
from vlaflow.compute.dense import Dense
from vlaflow.compute.parse import parse
from vlaflow.compute.sampler_choice import FAILURES, Candidate, SamplerCalibration, load
from vlaflow.compute.sampler_choice import FILE as SAMPLER
from vlaflow.compute.sampler_choice import choose as choose_candidate
from vlaflow.compute.spelling import DEFAULTS, Checkpoint, ComputeKind, Knobs, Spelling
from vlaflow.config import from_json, to_json
from vlaflow.errors import CalibrationError, ConfigError
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.precision import Dtype
from vlaflow.outputs import write_json
from vlaflow.ranges import Count, NotNegative, Positive
from vlaflow.strict import read_json
from vlaflow.versions import device_name, processor

T = TypeVar("T")
PROFILE, LADDER = "latency.json", "ladder.json"
TIME = "vlaflow bench latency CKPT"


@dataclass(frozen=True)
class Profile:
    """How long the parts of a chunk take for one observation; medians in milliseconds. ``cost`` tells the rest.

    Args:
        checkpoint: fingerprint.
        machine: its processor in words; another one must measure again, another number of cores need not.
        threads: of torch.
        base: everything outside layers and solver: image resizing, embedding, units.
        prefix: whole prefix up to each depth 1 … J.
        step: one decoder evaluation at each depth 1 … J; 0 where no exit was trained.
        start: what comes before the first evaluation at each depth (noise, latent tokens), likewise; empty for nothing.
        jitter: 99th percentile of a whole chunk over its median.
        chunks: timed.
        versions: of the software.
        work: what the parts compute.
        cost: fitted to chunks of several depths, steps and batches.
        device: "cpu", or the accelerator's name.
        dtype: what the networks computed in.
        engine: what computed them, in words (``Model.engine``).
    """

    checkpoint: str
    machine: str
    threads: Count
    base: NotNegative
    prefix: tuple[NotNegative, ...]
    step: tuple[NotNegative, ...]
    jitter: Positive
    chunks: Count
    versions: dict[str, str]
    work: ChunkWork
    cost: CostModel
    device: str = "cpu"
    dtype: Dtype = "fp32"
    engine: str = "eager"
    start: tuple[NotNegative, ...] = ()

    def __post_init__(self) -> None:
        stated = (self.prefix, self.step, self.work.prefix, self.work.step, self.start or self.step)
        depths = {len(each) for each in stated}
        if len(depths) > 1 or depths == {0}:
            raise CalibrationError(f"The parts of a chunk were not all measured at the same depths. Measure them: {TIME}")

    def dense(self, depth: int, nfe: int) -> float:
        """Median of a chunk at a fixed depth."""
        return self.worst((depth,), nfe)

    def worst(self, depths: tuple[int, ...], nfe: int) -> float:
        """Median of a chunk that leaves at the last of the depths, where one is made at each of them."""
        starts = sum(self.start[depth - 1] for depth in depths) if self.start else 0.0
        return self.base + self.prefix[depths[-1] - 1] + starts + nfe * sum(self.step[depth - 1] for depth in depths)

    def converted(self, milliseconds: float, nfe: float, layer_passes: float, eager: Profile) -> float:
        """What a chunk of so many evaluations and layer passes takes here that takes so long eagerly."""
        ours, theirs = (each.cost.milliseconds(each.work.spent(nfe, layer_passes)) for each in (self, eager))
        return milliseconds * ours / theirs


@dataclass(frozen=True)
class Rung:
    """A fixed depth and number of evaluations.

    Args:
        deviation: mean largest difference to the fullest one's chunk, in standard deviations of the actions.
        error: mean absolute distance to the demonstrated actions, in the same units.
    """

    depth: Count
    nfe: Count
    deviation: NotNegative
    error: NotNegative


@dataclass(frozen=True)
class Ladder:
    """Every fixed depth and number of evaluations that was measured, on ``samples`` held-out frames, in ``dtype``."""

    checkpoint: str
    dataset: str
    samples: Count
    rungs: tuple[Rung, ...]
    dtype: Dtype = "fp32"


@dataclass(frozen=True)
class Choice:
    """What fits, and what it is expected to take and lose.

    Args:
        compute: the compute policy.
        milliseconds: 99th percentile of the worst case, measured or predicted from its parts.
        error: what it is chosen by, smaller is better.
        loss: what it is expected to lose, as the rest of a sentence.
    """

    compute: ComputePolicy
    milliseconds: float
    error: float
    loss: str

    def __str__(self) -> str:
        return f"{self.compute.name}: {self.milliseconds:.1f} ms at p99 in the worst case; {self.loss}."


def _loss(deviation: float, error: float, full_error: float) -> str:
    more = 100 * (error / full_error - 1) if full_error else 0.0
    return (
        f"its chunks differ from the full computation's by {deviation:.3f} standard deviations at most on average, and from "
        f"the demonstrations by {more:+.1f} % compared with it"
    )


def choose(milliseconds: float, profile: Profile, ladder: Ladder, exits: dict[str, Calibration]) -> Choice:
    """The candidate with the smallest error that fits; of equal ones the fastest.

    An early exit whose sampler has another noise scale, grid or solver than the ladder's is none: it cannot be compared.

    Raises:
        CalibrationError: when nothing fits, saying what the fastest takes.
    """
    if not 0 < max((rung.depth for rung in ladder.rungs), default=0) <= len(profile.prefix):
        raise CalibrationError(f"{LADDER} and {PROFILE} were not measured at the same depths; measure again: {TIME}")
    full_error = max(ladder.rungs, key=lambda r: (r.depth, r.nfe)).error
    candidates = [
        Choice(
            Dense(rung.nfe, depth=rung.depth, label=f"dense:{rung.nfe},depth={rung.depth}"),
            profile.jitter * profile.dense(rung.depth, rung.nfe),
            rung.error,
            _loss(rung.deviation, rung.error, full_error),
        )
        for rung in ladder.rungs
    ]
    for name, found in exits.items():
        if found.plan.sampling != Sampling(found.plan.sampling.steps):
            continue
        each, worst = _worst(profile, found)
        base = next((r for r in ladder.rungs if (r.depth, r.nfe) == (found.plan.depths[-1], each)), None)
        if base is None:
            raise CalibrationError(
                f"{LADDER} does not say what {each} evaluations at full depth lose, which exit:{name} makes; measure again: "
                "vlaflow calibrate CKPT --dataset DIR"
            )
        # an early exit is compared with its own full depth on the same frames, and that with everything there is
        error = base.error * found.effect.error / found.effect.full_error
        deviation = base.deviation + found.effect.deviation  # at most, by the triangle inequality
        candidates.append(Choice(found.early_exit(f"exit:{name}"), worst, error, _loss(deviation, error, full_error)))
    fitting = [c for c in candidates if c.milliseconds <= milliseconds]
    if not fitting:
        fastest = min(candidates, key=lambda c: c.milliseconds)
        raise CalibrationError(
            f"Nothing fits {milliseconds:g} ms here; the fastest, {fastest.compute.name}, takes {fastest.milliseconds:.1f} ms "
            "at p99. Allow more, or train with exits."
        )
    return min(fitting, key=lambda c: (c.error, c.milliseconds))


def _worst(profile: Profile, found: Calibration) -> tuple[int, float]:
    """Evaluations at each depth of an early exit, and its 99th percentile when it takes all of its depths."""
    if found.plan.depths[-1] > len(profile.prefix):
        raise CalibrationError(
            f"{PROFILE} has no time of the depth {found.plan.depths[-1]}, at which an exit answers. Measure it: {TIME}"
        )
    each = round(found.effect.nfe / max(_answers(found), 1e-9))
    return each, profile.jitter * profile.worst(found.plan.depths, each)


def choose_sampler(
    milliseconds: float,
    calibration: SamplerCalibration,
    profile: Profile | None,
    exits: dict[str, Calibration],
    parse: Callable[[str], ComputePolicy],
) -> Choice:
    """The calibrated sampler, or early exit, that fits: the cheapest within one standard error of the best.

    An early exit is scored as its own full depth is, times what it loses against that on the frames of its calibration. It
    competes where its full depth is a candidate, a profile says how long it takes at worst, and the score is a measure on
    frames.

    Raises:
        CalibrationError: when nothing fits, saying what the fastest takes.
    """
    candidates = list(calibration.candidates)
    full = {each.compute: each for each in candidates}
    for name, found in exits.items():
        base = full.get(f"dense:{found.plan.sampling}")
        if base is not None and profile is not None and calibration.criterion != FAILURES:
            _, worst = _worst(profile, found)
            score = base.score * found.effect.error / found.effect.full_error
            median = worst / profile.jitter
            candidates.append(
                replace(
                    base,
                    compute=f"exit:{name}",
                    nfe=found.effect.nfe,
                    layer_passes=found.effect.layer_passes,
                    p50=median,
                    p99=worst,
                    score=score,
                    behind=base.behind + log(found.effect.error / found.effect.full_error),
                )
            )
    taken = choose_candidate(candidates, milliseconds, calibration.tolerance)
    scored = f"{calibration.criterion} {taken.score:.4g}, {taken.behind:.4g} ± {taken.standard_error:.2g} behind the best"
    return Choice(parse(taken.compute), taken.p99, taken.score, scored)


def within(checkpoint: Checkpoint, milliseconds: float, knobs: Knobs = DEFAULTS) -> Choice:
    """The best that fits, by the measurements in the checkpoint folder.

    Args:
        checkpoint: holds them.
        milliseconds: that must suffice.
        knobs: what it will be computed with.

    Raises:
        CalibrationError: when a measurement is missing, of other weights or of another machine, device, number of threads,
            dtype or engine; or nothing fits.
    """
    with naming(checkpoint.folder):
        return _within(checkpoint, milliseconds, knobs)


def _within(checkpoint: Checkpoint, milliseconds: float, knobs: Knobs) -> Choice:
    calibration, dtype = load(checkpoint), knobs.dtype
    if calibration is not None and calibration.here(knobs.device, knobs.threads, dtype):
        exits, profile = dict(exits_of(checkpoint, dtype)), None
        if knobs.engine != "eager":
            profile, eager = _profile(checkpoint, knobs), _profile(checkpoint, replace(knobs, engine="eager"))
            calibration = replace(calibration, candidates=_converted(calibration.candidates, profile, eager))
        elif exits and (checkpoint.folder / PROFILE).exists():
            profile = _profile(checkpoint, knobs)
        measured = knobs.as_measured()
        return choose_sampler(milliseconds, calibration, profile, exits, lambda name: parse(name, measured, checkpoint))
    profile = _profile(checkpoint, knobs)
    ladder = _read(checkpoint.folder / FOLDER / LADDER, Ladder, f"Measure it: {_measure_loss(knobs)}")
    _require_weights(checkpoint, LADDER, ladder.checkpoint, _measure_loss(knobs))
    if ladder.dtype != dtype:
        raise CalibrationError(
            f"{LADDER} in {checkpoint.folder} was measured in {ladder.dtype}, and this is {dtype}. Measure it: "
            f"vlaflow calibrate CKPT --dataset DIR --dtype {dtype}"
        )
    return choose(milliseconds, profile, ladder, dict(exits_of(checkpoint, dtype)))


def _converted(candidates: Sequence[Candidate], profile: Profile, eager: Profile) -> tuple[Candidate, ...]:
    """With the milliseconds of the profile's engine."""

    def here(each: Candidate, milliseconds: float) -> float:
        return profile.converted(milliseconds, each.nfe, each.layer_passes, eager)

    return tuple(replace(each, p50=here(each, each.p50), p99=here(each, each.p99)) for each in candidates)


def _require_weights(checkpoint: Checkpoint, file: str, found: str, command: str) -> None:
    if found != checkpoint.fingerprint:
        raise CalibrationError(f"{file} in {checkpoint.folder} was measured with other weights; measure again: {command}")


def _profile(checkpoint: Checkpoint, knobs: Knobs) -> Profile:
    """The profile of the checkpoint, measured here."""
    file = profile_file(knobs.engine)
    again = f"Measure it: {_measure_time(knobs)}"
    profile = _read(checkpoint.folder / file, Profile, again)
    _require_weights(checkpoint, file, profile.checkpoint, _measure_time(knobs))
    for what, was, now in (("on", profile.machine, processor()), ("with engine", profile.engine, knobs.engine)):
        if was != now:
            raise CalibrationError(f"{file} in {checkpoint.folder} was measured {what} {was}; this is {now}. {again}")
    measured = (profile.device, profile.threads, profile.dtype)
    here = (device_name(knobs.device), knobs.threads, knobs.dtype)
    if measured != here:
        raise CalibrationError(
            f"{file} in {checkpoint.folder} was measured on {measured[0]} with {measured[1]} thread(s) in {measured[2]}; "
            f"this is {here[0]} with {here[1]} in {here[2]}. Measure it: {_measure_time(knobs, everything=True)}"
        )
    return profile


def _measure_time(knobs: Knobs, *, everything: bool = False) -> str:
    """How to measure the profile that is missing: the command, with the options that are not its own defaults, or all."""
    options = [("device", knobs.device, "cpu"), ("threads", knobs.threads, 1), ("dtype", knobs.dtype, "fp32")]
    stated = [f" --{name} {value}" for name, value, usual in options if everything or value != usual]
    compiler = knobs.engine.partition(" ")[0]
    return TIME + "".join(stated) + (f" --engine {compiler}" if compiler.startswith("graphs") else "")


def _measure_loss(knobs: Knobs) -> str:
    """How to measure what fewer steps and layers lose: by the sampler's calibration, which every checkpoint can have.

    It is made for one thread; for more, exits have a ladder.
    """
    stated = [
        f" --{name} {value}"
        for name, value, usual in (("device", knobs.device, "cpu"), ("dtype", knobs.dtype, "fp32"))
        if value != usual
    ]
    return f"vlaflow calibrate CKPT --dataset DIR{' --sampler' if knobs.threads == 1 else ''}{''.join(stated)}"


def profile_file(engine: str) -> str:
    """Name of the profile of an engine, which is given in words: one per compiler."""
    compiler = engine.partition(" ")[0]
    return PROFILE if compiler == "eager" else f"latency-{compiler}.json"


def save(value: Any, file: Path) -> None:
    """Write a profile or a ladder."""
    write_json(file, to_json(value))


def exits_of(checkpoint: Checkpoint, dtype: Dtype, *, damaged: bool = True) -> Iterator[tuple[str, Calibration]]:
    """The calibrated early exits of a checkpoint by name, of these weights and this dtype.

    Args:
        checkpoint, dtype: what they must be made for.
        damaged: whether to refuse those that cannot be read, instead of leaving them out.

    Raises:
        CalibrationError, ConfigError: for a damaged one.
    """
    for file in sorted((checkpoint.folder / FOLDER).glob("*.json")):
        if file.name not in (LADDER, SAMPLER):
            try:
                found = Calibration.load(file)
            except (CalibrationError, ConfigError):
                if damaged:
                    raise
                continue
            if (found.checkpoint, found.dtype) == (checkpoint.fingerprint, dtype):
                yield file.stem, found


def _answers(found: Calibration) -> float:
    """Mean number of depths that answered."""
    return sum(share * (number + 2) for number, share in enumerate(found.effect.shares))


def _read(file: Path, kind: type[T], command: str) -> T:
    if not file.exists():
        raise CalibrationError(f"A budget needs {file.name}, which {file.parent} lacks. {command}")
    return from_json(kind, read_json(file, CalibrationError, f"it is damaged. {command}"), str(file))


def _parse(typed: Spelling) -> ComputePolicy:
    typed.require(more=True, usage="a budget is typed as budget:MILLISECONDS.")
    checkpoint = typed.measured()
    try:
        milliseconds = float(typed.more)
        if not milliseconds > 0:
            raise ValueError
    except ValueError:
        raise ConfigError(f"A budget is a number of milliseconds above 0, as in budget:20, got '{typed.more}'.") from None
    return within(checkpoint, milliseconds, typed.knobs).compute


BUDGET = ComputeKind(_parse)
