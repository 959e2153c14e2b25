"""``vlaflow record``: demonstrations of scripted experts as a LeRobot data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlaflow.cli.arguments import parse_arguments
from vlaflow.ranges import Count, NotNegative, Number, Seed


@dataclass(frozen=True)
class Record:
    """Record demonstrations of scripted experts as a LeRobot v3.0 data set.

    Example: vlaflow record --env metaworld/drawer-open-v3 --env metaworld/window-close-v3 --episodes 50 --out runs/data

    The same arguments give the same bytes with any number of workers. Run the same command again to continue an interrupted
    recording.

    Args:
        env: suite/task, or a group such as metaworld/easy or metaworld/all; repeat the option for more.
        out: folder of the new data set; must not exist.
        episodes: number of successful episodes per environment.
        workers: number of recording processes; one per core is best.
        size: side of the image in pixels, even; by default the suite's, e.g. 96 for Meta-World and 128 for LIBERO.
        render: exact keeps the simulator's shadows and antialiasing (published numbers), fast omits them.
        seed: another seed gives other episodes, but never those of an evaluation.
        noise: standard deviation of the noise on the executed movement (1 is the full range), 0.1 by default; the label stays
            clean. Give it several times for episodes that take turns.
        noise_memory: correlation of the noise from one step to the next, 0 to below 1; one, or one for each --noise.
        misjudge: standard deviation in metres per axis of a temporary error in the hand position that the expert assumes, in
            half of the episodes; the label stays clean. One, or one for each --noise.
        after_success: number of frames kept after the first success.
    """

    env: tuple[str, ...]
    out: Path
    episodes: Count = 50
    workers: Number = 2
    size: Count | None = None
    render: Literal["fast", "exact"] = "fast"
    seed: Seed = 0
    noise: tuple[NotNegative, ...] = ()
    noise_memory: tuple[NotNegative, ...] = ()
    misjudge: tuple[NotNegative, ...] = ()
    after_success: Number = 4


def main(argv: list[str]) -> int:
    """Run ``vlaflow record ...``; returns the exit status."""
    import tyro
    from rich.console import Console

    arguments = parse_arguments(Record, "vlaflow record", argv, config=(tyro.conf.UseAppendAction,))

    from vlaflow.simulators.experts import noises
    from vlaflow.simulators.record import RecordConfig, record_with_progress

    config = RecordConfig(
        envs=arguments.env,
        episodes=arguments.episodes,
        size=arguments.size,
        render=arguments.render,
        seed=arguments.seed,
        noise=noises(arguments.noise, arguments.noise_memory, arguments.misjudge),
        after_success=arguments.after_success,
    )
    summary = record_with_progress(config, arguments.out, arguments.workers)
    console = Console()
    console.print(f"Written: {summary.root}: {summary.episodes} episodes, {summary.frames} frames.", soft_wrap=True)
    for name, count in summary.failed.items():
        console.print(f"{name}: {count} failed episode(s) left out and replaced by other seeds.", soft_wrap=True)
    played = summary.episodes + sum(summary.failed.values())
    console.print(
        f"The experts succeeded in {summary.episodes} of {played} attempts ({summary.episodes / played:.1%}).", soft_wrap=True
    )
    return 0
