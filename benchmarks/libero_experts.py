"""How often LIBERO's scripted experts succeed, and in how many steps: the episodes of `vlaflow record`, without images.

    python -m benchmarks.libero_experts --suite object --episodes 20

Every episode starts at a drawn placement and executes the recorder's noise. It counts as a success at the first try if its
first seed succeeds, and with retries if one of `--attempts` seeds does.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro

from vlaflow.errors import CapabilityError
from vlaflow.simulators import make
from vlaflow.simulators.base import RANDOM_START
from vlaflow.simulators.experts import Noise, Noisy, episode_generator, expert_for
from vlaflow.simulators.libero_tasks import GROUPS
from vlaflow.simulators.record import episode_seed


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        suite: a group of LIBERO: object, spatial, goal, long, or a variant such as goal_swap.
        tasks: numbers of the tasks; all by default.
        episodes: episodes per task.
        attempts: seeds tried per episode.
        noise, memory, misjudge: the recorder's disturbance of executed actions; see ``Noise``.
        json: file for the results.
    """

    suite: str = "object"
    tasks: tuple[int, ...] = ()
    episodes: int = 20
    attempts: int = 3
    noise: float = 0.1
    memory: float = 0.0
    misjudge: float = 0.0
    json: Path | None = None


@dataclass(frozen=True)
class Row:
    """The episodes of one task.

    Args:
        task: its name.
        instruction: in words.
        first: successes of the first seed.
        retried: successes of one of the seeds.
        episodes: number of episodes.
        steps: mean steps of the successes at the first try.
        longest: steps of the longest of them.
        seconds: per episode, without the time to build the environment.
        failed: the seeds that failed.
    """

    task: str
    instruction: str
    first: int
    retried: int
    episodes: int
    steps: float
    longest: int
    seconds: float
    failed: list[int]


def play(name: str, options: Options) -> Row:
    """Play the episodes of one task."""
    env = make(f"libero/{name}")
    is_gripper = np.array([dimension.frame == "gripper" for dimension in env.action_spec.dimensions])
    noise = Noise(options.noise, memory=options.memory, misjudge=options.misjudge)
    lengths: list[int] = []
    failed: list[int] = []
    retried = played = 0
    began = time.perf_counter()
    for episode in range(options.episodes):
        for attempt in range(options.attempts):
            seed = episode_seed(0, episode, attempt)
            expert = Noisy(expert_for(env.name), noise, episode_generator(env.name, seed), is_gripper)
            env.restart(seed, RANDOM_START)
            success = truncated = False
            while not (success or truncated):
                _, success, truncated, info = env.advance(expert(env)[0])
            played += 1
            if success:
                retried += 1
                if attempt == 0:
                    lengths.append(info["steps"])
                break
            failed.append(seed)
    seconds = (time.perf_counter() - began) / played
    mean, longest = (float(np.mean(lengths)), max(lengths)) if lengths else (float("nan"), 0)
    env.close()
    return Row(name, env.task_description, len(lengths), retried, options.episodes, mean, longest, seconds, failed)


def main(options: Options) -> None:
    """Print one line per task and the sums, as a table in markdown."""
    print("| task | instruction | first try | with retries | steps | longest | s |\n|---|---|---|---|---|---|---|", flush=True)
    rows: list[Row] = []
    for number, name in enumerate(GROUPS[options.suite]):
        if options.tasks and number not in options.tasks:
            continue
        try:
            row = play(name, options)
        except CapabilityError as problem:
            print(f"| {name} | {problem} | | | | | |", flush=True)
            continue
        rows.append(row)
        print(
            f"| {row.task} | {row.instruction} | {row.first}/{row.episodes} | {row.retried}/{row.episodes} | {row.steps:.0f} | "
            f"{row.longest} | {row.seconds:.1f} |" + (f" <!-- failed: {row.failed} -->" if row.failed else ""),
            flush=True,
        )
    first, retried, total = (sum(getattr(row, key) for row in rows) for key in ("first", "retried", "episodes"))
    print(f"| **{options.suite}** | | **{first}/{total}** | **{retried}/{total}** | | | |")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
