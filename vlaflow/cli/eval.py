"""``vlaflow eval``: success, intervals, paired tests and latency of a checkpoint, with a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.packages import PAGES, require
from vlaflow.ranges import Count, NotNegative, Number, Seed

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vlaflow.evaluation.config import EvaluationConfig
    from vlaflow.evaluation.results import PairedTest, Results


@dataclass(frozen=True)
class Eval:
    """Measure a checkpoint's success rate and latency; write results.json and report.html.

    Example: vlaflow eval runs/demo/rated --env metaworld/drawer-open-v3 --episodes 20 --compute dense --compute refine

    All compute policies use the same seeds and noise, so they are compared in pairs. The same arguments give the same
    successes with any number of workers. Run the same command again to continue after an interruption.

    Args:
        checkpoint: folder, or Hugging Face repository id.
        env: suite/task, or a group such as metaworld/easy; repeat the option for more.
        robot: robot to act for, if the checkpoint was trained for several.
        compute: dense, dense:2 (solver steps), dense:2@0.5 (from half the noise; docs/sampling.md), dense:2,depth=3 (through
            three layers), mean:8 or medoid:8 (of eight draws), refine (what is rated below ``threshold`` is regenerated),
            refine-random (each action with probability 0.5), exit:NAME (a calibration of the checkpoint), refine+exit:NAME,
            budget:MS, or auto (chosen by vlaflow calibrate --sampler); repeat the option for more. By default auto if the
            checkpoint's sampler was calibrated, else dense.
        episodes: number of environment seeds per environment and compute policy.
        noise_seeds: episodes per environment seed, with other noise of the policy each; the intervals account for it.
        out: folder for results.json, report.html and videos.
        n_action_steps: actions executed per chunk; the checkpoint's default if omitted.
        steps: solver steps per round, where the compute policy states none.
        threshold: confidence below which refine regenerates an action; spread above which refine-spread does; probability below
            which refine-tokens regenerates a token.
        any_training: also refine a checkpoint that was not trained for it.
        max_steps: step limit of an episode; the suite's by default.
        render: image quality; use the one the policy was trained with.
        seed: the first environment seed; the others follow.
        workers: number of processes; one per core is best.
        batch: episodes of one environment and compute policy that a process plays together, with one batched call of the
            policy. It changes chunks by rounding only; with 1 they equal those of single observations to the bit.
        language: episodes per environment and wrong instruction of the language-swap test; 0 to skip it.
        videos: record a success and a failure per environment.
        device: where the networks run.
        dtype: what they compute in; bf16 halves the memory of their layers.
        engine: what computes chunks: the networks (eager), programs that vlaflow deploy built (aoti, openvino), fused layers
            on a GPU (graphs, graphs-fp8), or the fastest program available (auto).
        fresh: discard an unfinished evaluation in ``out``; without it, the same command continues one.
        shard: play only this part of the episodes, such as 2/4, and keep them in ``out``; vlaflow merge combines all parts
            (docs/scale.md).
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    env: tuple[str, ...]
    robot: str | None = None
    compute: tuple[str, ...] = ()
    episodes: Count = 20
    noise_seeds: Count = 1
    out: Path = Path("runs/eval")
    n_action_steps: Count | None = None
    steps: Count = 10
    threshold: NotNegative = 0.5
    any_training: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    max_steps: Count | None = None
    render: Literal["fast", "exact"] = "fast"
    seed: Seed = 1000
    workers: Number = 2
    batch: Count = 4
    language: Number = 0
    videos: bool = True
    device: str = "cpu"
    dtype: Literal["fp32", "bf16"] = "fp32"
    engine: Literal["auto", "eager", "aoti", "openvino", "graphs", "graphs-fp8"] = "eager"
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    shard: str | None = None
    hub: HubGroup = ONLINE


def main(argv: list[str]) -> int:
    """Run ``vlaflow eval ...``; returns the exit status."""
    arguments = parse_arguments(Eval, "vlaflow eval", argv, config=(tyro.conf.UseAppendAction,))
    require(*PAGES)  # checked first, because the report is written last

    from rich.console import Console

    from vlaflow.compute.spelling import Knobs
    from vlaflow.evaluation.config import EvaluationConfig
    from vlaflow.evaluation.rollout import RolloutConfig
    from vlaflow.evaluation.run import play_shard, run
    from vlaflow.evaluation.shards import Shard
    from vlaflow.policies.robots import robot_folder
    from vlaflow.reports.evaluation import write_report

    config = EvaluationConfig(
        envs=arguments.env,
        computes=arguments.compute,
        episodes=arguments.episodes,
        first_seed=arguments.seed,
        noise_seeds=arguments.noise_seeds,
        knobs=Knobs(arguments.steps, arguments.threshold, arguments.any_training, arguments.device, dtype=arguments.dtype),
        rollout=RolloutConfig(
            arguments.n_action_steps,
            arguments.max_steps,
            arguments.render,
            arguments.device,
            arguments.batch,
            arguments.dtype,
            arguments.engine,
        ),
        language_episodes=arguments.language,
        videos=arguments.videos,
        workers=arguments.workers,
    )
    console, out, checkpoint = Console(), arguments.out, arguments.checkpoint
    if arguments.robot is not None:
        checkpoint = str(robot_folder(checkpoint, arguments.robot))
    if arguments.shard is not None:
        shard = Shard.parse(arguments.shard)
        played = play_shard(checkpoint, config, out, shard, fresh=arguments.fresh)
        console.print(
            f"Shard {shard}, {played} episodes: {out / shard.file}. When all shards are there: vlaflow merge {out}",
            soft_wrap=True,
        )
        return 0
    results = run(checkpoint, config, out, fresh=arguments.fresh, report=write_report)
    for name in arguments.compute:
        if name == "auto" or name.startswith("budget:"):
            console.print(f"{name} is {chosen(checkpoint, name, config)}")
    show(results, out)
    return 0


def show(results: Results, out: Path) -> None:
    """Print the table of the results in a folder."""
    from rich.console import Console

    from vlaflow.reports.evaluation import PAGE

    console = Console()
    console.print(table(results))
    console.print(f"Written: {out / 'results.json'} and {out / PAGE}", soft_wrap=True)


def chosen(checkpoint: str, name: str, config: EvaluationConfig) -> str:
    """The compute policy that "auto" or a budget in milliseconds stands for, with what was measured of it."""
    from vlaflow.compute.auto import calibrated
    from vlaflow.compute.budget import within
    from vlaflow.compute.spelling import Checkpoint
    from vlaflow.policies.engines import for_budgets
    from vlaflow.policies.provenance import fingerprint
    from vlaflow.policies.robots import robot_folder

    folder = robot_folder(checkpoint, None)
    if name == "auto":
        found = calibrated(folder, fingerprint, config.knobs)
        return found.name if found else name
    home = Checkpoint(folder, fingerprint(folder))
    _, knobs = for_budgets(config.rollout.engine, config.computes, config.knobs, home)
    return f"{within(home, float(name.partition(':')[2]), knobs)} It is computed by: {knobs.engine}."


def table(results: Results) -> RenderableType:
    """Table of successes, intervals, steps and latency, followed by the paired tests."""
    from rich import box
    from rich.console import Group
    from rich.table import Column, Table

    from vlaflow.reports.words import middle, percent, played, short, step_limits, too_few

    first = results.evaluations[0]
    grid = Table(
        Column("task", overflow="fold"),
        Column("compute", overflow="fold"),
        "success",
        "95 % interval",
        "steps",
        "p50 ms",
        "p99 ms",
        box=box.SIMPLE,
        padding=0,
        title=f"{played(results)}, {first.n_action_steps} actions per chunk executed, "
        f"step limit {step_limits(results.evaluations)}",
        title_style="",
        title_justify="left",
    )
    for entry in results.evaluations:
        times = entry.latency_ms
        grid.add_row(
            short(entry.env),
            entry.compute,
            f"{entry.successes}/{entry.episodes}",
            percent(entry.interval),
            middle(entry.first_success_steps),
            *((f"{times.p50:.1f}", f"{times.p99:.1f}") if times else ()),
            end_section=entry.compute == results.computes[-1],
        )
    if len(results.envs) > 1:
        for overall in results.overall:
            rate = f"{overall.successes}/{overall.episodes}"
            grid.add_row("all", overall.compute, rate, percent(overall.interval))
        for overall in results.overall:
            for mean in overall.by_group:
                for group in mean.groups:
                    rate = f"{group.successes}/{group.episodes}"
                    grid.add_row(f"{mean.suite}/{group.group}", overall.compute, rate, percent(group.interval))
                name = f"mean of {len(mean.groups)} groups"
                grid.add_row(name, overall.compute, f"{100 * mean.mean:.1f} %", percent(mean.interval))
    return Group(grid, *(sentence(test) for test in results.paired if test.env == "all"), *too_few(results))


def sentence(test: PairedTest) -> str:
    """A paired test in words."""
    low, high = (100 * side for side in test.interval)
    return (
        f"{test.second} against {test.first}: {100 * test.difference:+.1f} points [{low:+.1f}, {high:+.1f}], "
        f"alone successful in {test.only_second} and {test.only_first} episodes, p = {test.p_value:.2g}"
    )
