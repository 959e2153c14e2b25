"""``vlaflow record-vqa``: questions about simulated scenes, with images and true answers, as a VQA data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlaflow.cli.arguments import parse_arguments
from vlaflow.ranges import Count, NotNegative, Number, Seed


@dataclass(frozen=True)
class RecordVqa:
    """Record questions about images from episodes of scripted experts as a VQA data set in LLaVA's format.

    Example: vlaflow record-vqa --env metaworld/drawer-open-v3 --env metaworld/window-close-v3 --episodes 50 --out runs/qa

    Answers come from the simulator's state and are balanced, so that the most frequent answer is no better than chance. The
    same arguments give the same bytes with any number of workers.

    Args:
        env: suite/task, or a group; repeat the option for more.
        out: folder of the new data set; must not exist.
        episodes: number of episodes per environment.
        frames: number of frames per episode.
        kind: kinds of question: what, side, height, near, nearer, state, gripper, count; repeat the option for more. All but
            gripper when none is named; gripper needs an image larger than 96.
        most: largest number of questions with the same wording and answer in one environment.
        workers: number of recording processes; one per core is best.
        size: side of the image in pixels; use that of the policy.
        render: image quality; use that of the robot's data.
        seed: another seed gives other episodes, but never those of a recording or an evaluation.
        wander: number of random points that the gripper visits before the expert begins.
        noise: standard deviation of the noise on the movement (1 is the full range).
    """

    env: tuple[str, ...]
    out: Path
    episodes: Count = 50
    frames: Count = 16
    kind: tuple[str, ...] = ()
    most: Count = 150
    workers: Number = 2
    size: Count = 96
    render: Literal["fast", "exact"] = "fast"
    seed: Seed = 0
    wander: Number = 4
    noise: NotNegative = 0.1


def main(argv: list[str]) -> int:
    """Run ``vlaflow record-vqa ...``; returns the exit status."""
    import tyro
    from rich.console import Console

    arguments = parse_arguments(RecordVqa, "vlaflow record-vqa", argv, config=(tyro.conf.UseAppendAction,))

    from vlaflow.progress import progress
    from vlaflow.simulators.base import expand_env_names
    from vlaflow.simulators.experts import Noise
    from vlaflow.simulators.record_vqa import VqaRecordingConfig, record_vqa
    from vlaflow.simulators.scenes import USUAL

    config = VqaRecordingConfig(
        envs=arguments.env,
        episodes=arguments.episodes,
        frames=arguments.frames,
        kinds=arguments.kind or USUAL,
        most=arguments.most,
        size=arguments.size,
        render=arguments.render,
        seed=arguments.seed,
        wander=arguments.wander,
        noise=Noise(arguments.noise),
    )
    total = len(expand_env_names(config.envs)) * config.episodes
    with progress(total, "Recording") as bar:
        summary = record_vqa(config, arguments.out, arguments.workers, lambda *_: bar.advance())
    console = Console()
    console.print(f"Written: {summary.root}: {summary.questions} questions, {summary.images} images.", soft_wrap=True)
    for kind, wordings in summary.counts.items():
        number = sum(n for counts in wordings.values() for n in counts.values())
        answers = sorted({answer for counts in wordings.values() for answer in counts})
        console.print(f"  {kind}: {number} ({', '.join(answers)})", soft_wrap=True)
    return 0
