"""``vlaflow calibrate``: the sampler, thresholds of early exits or of a refinement, on held-out data or in simulation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.cli.calibrate_options import require_effect
from vlaflow.cli.reading import LEROBOT, ReadingGroup
from vlaflow.errors import ConfigError
from vlaflow.packages import PAGES, require
from vlaflow.ranges import Count, NotNegative, Number, Positive, Share

if TYPE_CHECKING:
    from vlaflow.compute.calibration import Calibration
    from vlaflow.evaluation.calibrate import ByRisk, ByShares


@dataclass(frozen=True)
class CalibrateArguments:
    """Calibrate the sampler, early exits or refinement of a checkpoint; results and plots are written to CKPT/calibration.

    Sampler: vlaflow calibrate runs/demo/policy --dataset runs/demo/dataset --sampler --budget-ms 20

    Then --compute auto, the default of vlaflow eval and serve, runs the chosen steps, noise scale and number of draws.

    Exits: vlaflow calibrate runs/a1/policy --dataset runs/a1/dataset --exit-budget 0.4

    Then: vlaflow eval runs/a1/policy --env metaworld/drawer-open-v3 --compute dense --compute exit:budget-0.4

    Refinement: vlaflow calibrate runs/demo/rated --dataset runs/demo/dataset --refine --share 0.25

    Then: vlaflow eval runs/demo/rated --env metaworld/drawer-open-v3 --compute auto --compute refine:share-0.25

    Half of the held-out episodes determine the thresholds of exits, the other half show their effect. Give either a budget (the
    share of chunks that exit at each depth) or a largest deviation from the chunk of full depth.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """Folder of a checkpoint; exits can be calibrated if it was trained with them."""
    dataset: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """LeRobot data set (folder, or name on the Hub); for that of the training, its held-out episodes are used."""
    robot: str | None = None
    """Robot to calibrate for, if the checkpoint was trained for several; the calibration holds for this one alone."""
    sampler: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Calibrate the sampler instead of exits: solver steps, noise scale, temperature, draws, depth."""
    budget_ms: Positive | None = None
    """With --sampler: largest 99th percentile of a chunk in milliseconds, on this machine."""
    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """With --sampler: choose by success in these environments, on seeds that no evaluation uses; repeat for more."""
    rollouts: Count = 1200
    """With --env: episodes of all candidates together (successive halving)."""
    compute: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """With --sampler: a candidate, instead of the default ones; repeat for more. With --refine: the first round; by default the
    calibrated sampler, or dense."""
    workers: Number = 2
    """With --env: number of processes."""
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With --env: start over, instead of continuing an interrupted calibration."""
    refine: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Calibrate the threshold of a refinement instead of exits, and print what each doubt knows and brings."""
    share: Share | None = None
    """With --refine: share of the executed actions that is regenerated; 0.25 unless --max-deviation is given."""
    doubt: Literal["rater", "spread"] = "rater"
    """With --refine: what doubts, the rater or the spread of --draws draws of two steps."""
    draws: Annotated[Count, tyro.conf.arg(metavar="N")] = 8
    """With --refine: draws whose spread is measured."""
    clock: Share = 1.0
    """With --refine: clock that doubted actions go back to; 1 makes them from noise."""
    exit_budget: Positive | None = None
    """Compute budget c of the exit distribution; smaller values exit earlier. 0.4 unless --max-deviation is given."""
    exit_distribution: Literal["exponential", "gaussian", "gamma"] = "exponential"
    """Family of the exit distribution."""
    first_exit: bool = True
    """Whether to use the first exit."""
    max_deviation: NotNegative | None = None
    """Largest difference of a chunk from that of full depth, in --deviation on normalised actions; replaces --exit-budget. With
    --refine: largest error of an action that is kept (root mean square over its dimensions); replaces --share."""
    confidence: Share = 0.9
    """With --max-deviation: at least this share of the chunks stays within it (with 95 % probability)."""
    deviation: Literal["max_abs", "mean_abs", "l2", "cosine"] = "max_abs"
    """How the deviation is measured; max_abs is in standard deviations of the actions."""
    name: str | None = None
    """Name of the calibration; derived from the target by default."""
    depths: tuple[Count, ...] = ()
    """Depths of the exits, ending with the full one; all trained ones by default. The first is only compared with."""
    metric: Literal["cosine", "l2", "mean_abs", "max_abs"] = "cosine"
    """How the chunks of two depths are compared."""
    sampling: str | None = None
    """Solver steps at each depth (by default 2), and other settings of the sampler, as in --compute dense:2@0.5. With --refine:
    of the second round; by default as in the first."""
    warm_start: Literal["fresh", "same", "anchor", "renoise"] = "same"
    """Where the sampling at the next depth starts: new noise, the same noise, the last chunk, or that chunk noised again."""
    restart: Share = 0.5
    """Clock that renoise starts from."""
    episodes: Literal["held-out", "all"] = "held-out"
    """Which episodes to measure on; all only for data on which the checkpoint was not trained."""
    frames: Count | None = None
    """Number of frames to measure: 1024 by default, for exits over both halves; 256 with --sampler, 512 with --refine."""
    ladder: bool = True
    """Also measure the error of fixed depths and steps, which --compute budget:MS needs."""
    device: str = "cpu"
    """Where the networks run."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What they compute in; the calibration holds for this alone."""

    how: ReadingGroup = LEROBOT
    hub: HubGroup = ONLINE


def main(argv: list[str]) -> int:
    """Run ``vlaflow calibrate ...``; returns the exit status."""
    given = parse_arguments(CalibrateArguments, "vlaflow calibrate", argv)
    if given.sampler and given.refine:
        raise ConfigError("Give either --sampler or --refine; refinement starts from the calibrated sampler.")
    require_effect(given, "sampler" if given.sampler else "refine" if given.refine else "exits")
    require(*PAGES)  # checked first, because the page is written last
    if given.refine:
        return _refine(given)
    return _sampler(given) if given.sampler else _exits(given)


def _sampler(given: CalibrateArguments) -> int:
    from rich.console import Console

    from vlaflow.compute.calibration import FOLDER
    from vlaflow.compute.sampler_choice import FILE
    from vlaflow.evaluation import calibrate_sampler
    from vlaflow.policies.robots import robot_folder
    from vlaflow.reports.sampler import words, write_page

    request = calibrate_sampler.SamplerRequest(
        computes=given.compute,
        budget_ms=given.budget_ms,
        frames=given.frames or 256,
        new_data=given.episodes == "all",
        envs=given.env,
        episodes=given.rollouts,
        workers=given.workers,
        fresh=given.fresh,
        reading=given.how.reading(),
    )
    checkpoint = robot_folder(given.checkpoint, given.robot)
    made = calibrate_sampler.run(checkpoint, given.dataset, request, given.device, given.dtype, report=write_page)
    file = checkpoint / FOLDER / FILE
    console = Console()
    console.print(words(made))
    console.print(f"Written: {file} and {file.with_suffix('.html')}", soft_wrap=True)
    return 0


def _refine(given: CalibrateArguments) -> int:
    from rich.console import Console

    from vlaflow.compute.spelling import read_sampling
    from vlaflow.evaluation import refinement
    from vlaflow.policies.robots import robot_folder
    from vlaflow.reports.refinement import words, write_page

    if len(given.compute) > 1:
        raise ConfigError("A refinement has one first round; give --compute once.")
    share, risk = 0.25 if given.share is None else given.share, 1 - given.confidence
    by_risk = given.max_deviation is not None
    name = f"deviation-{given.max_deviation:g}" if by_risk else f"share-{share:g}"
    request = refinement.RefineRequest(
        name=given.name or (name if given.doubt == "rater" else f"{given.doubt}-{name}"),
        target=refinement.ByRegenerated(share)
        if given.max_deviation is None
        else refinement.ByKeptError(given.max_deviation, risk),
        doubt=given.doubt,
        draws=given.draws,
        first="".join(given.compute),
        sampling=None if given.sampling is None else read_sampling(given.sampling, 2, f"--sampling {given.sampling}"),
        clock=given.clock,
        frames=given.frames or 512,
        new_data=given.episodes == "all",
        reading=given.how.reading(),
    )
    made = refinement.run(robot_folder(given.checkpoint, given.robot), given.dataset, request, given.device, given.dtype)
    page = write_page(made.calibration, made.drafts, made.file.with_suffix(".html"))
    console = Console()
    console.print(words(made.calibration), soft_wrap=True)
    console.print(f"Written: {made.file} and {page}", soft_wrap=True)
    return 0


def _exits(given: CalibrateArguments) -> int:
    from rich.console import Console

    from vlaflow.compute.spelling import read_sampling
    from vlaflow.evaluation import calibrate
    from vlaflow.policies.robots import robot_folder
    from vlaflow.reports.calibration import write_page

    request = calibrate.Request(
        name=given.name or _name(given),
        target=_target(given),
        depths=given.depths,
        metric=given.metric,
        sampling=read_sampling(given.sampling or "2", 2, f"--sampling {given.sampling}"),
        warm_start=given.warm_start,
        restart=given.restart,
        deviation=given.deviation,
        frames=given.frames or 1024,
        new_data=given.episodes == "all",
        ladder=given.ladder,
        reading=given.how.reading(),
    )
    made = calibrate.run(robot_folder(given.checkpoint, given.robot), given.dataset, request, given.device, given.dtype)
    page = write_page(made.calibration, made.table, made.file.with_suffix(".html"))
    console = Console()
    console.print(_words(made.calibration))
    console.print(f"Written: {made.file} and {page}", soft_wrap=True)
    return 0


def _target(given: CalibrateArguments) -> ByRisk | ByShares:
    from vlaflow.evaluation.calibrate import ByRisk, ByShares

    if given.max_deviation is not None:
        return ByRisk(given.max_deviation, 1 - given.confidence, metric=given.deviation)
    return ByShares(given.exit_distribution, 0.4 if given.exit_budget is None else given.exit_budget, given.first_exit)


def _name(given: CalibrateArguments) -> str:
    if given.max_deviation is not None:
        return f"deviation-{given.max_deviation:g}"
    return f"budget-{0.4 if given.exit_budget is None else given.exit_budget:g}"


def _words(made: Calibration) -> str:
    test, plan = made.effect, made.plan
    shares = ", ".join(f"{depth}: {100 * share:.0f} %" for depth, share in zip(plan.exits, test.shares, strict=True))
    lines = [
        f"Thresholds from {made.samples} frames, tested on {test.samples} others from other episodes.",
        f"Chunks that exit at depth {shares}; {test.layers:.2f} of {plan.exits[-1]} layers and {test.nfe:.1f} "
        "evaluations on average.",
        f"Largest difference from the full depth {test.deviation:.3f} standard deviations on average; distance to the "
        f"demonstrations {test.error:.4f}, at full depth {test.full_error:.4f}.",
    ]
    if test.above is not None:
        lines.append(f"Above the largest allowed deviation: {100 * test.above:.1f} % of the chunks.")
    return "\n".join(lines)
