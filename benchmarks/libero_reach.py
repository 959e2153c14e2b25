"""Does a policy reach for where the object is, or for where objects were in its demonstrations?

    python -m benchmarks.libero_reach CKPT --env libero/goal/6 --episodes 20

Objects of a task stand a few centimetres apart from episode to episode. Where the hand is when it first closes is compared with
where the object was, over the stored initial states: slope 1 is a hand that follows the object, 0 one that always goes to the
same place. A policy can succeed without looking as long as the fingers open wider than objects are moved.

Shape letters: E episodes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.parse import parse
from vlaflow.policies.base import Policy
from vlaflow.simulators import make
from vlaflow.simulators.base import expand_env_names
from vlaflow.simulators.libero_scene import LiberoScene

MOVED = ("in", "on")
"""Predicates whose first object the hand reaches for."""
FEWEST = 3
"""Episodes that a slope needs."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        checkpoint: folder of a policy.
        env: environments or groups of LIBERO; tasks without an object to move are left out.
        compute: compute policy.
        episodes: per task, from the stored initial state 0 on.
        steps: most steps until the hand closes.
        json: file for the results.
    """

    checkpoint: tyro.conf.Positional[Path]
    env: tuple[str, ...] = ("libero/goal/6",)
    compute: str = "auto"
    episodes: int = 20
    steps: int = 150
    json: Path | None = None


@dataclass(frozen=True)
class Reach:
    """The episodes of one task, or of several with each task's mean taken off.

    Args:
        task: its name.
        episodes: in which the hand closed.
        slope: metres that the hand moves per metre that the object does, horizontally.
        error: of the slope, one standard deviation.
        spread: of the objects' positions, millimetres, one standard deviation per axis.
        miss: of the hand relative to the object, without the mean, likewise.
    """

    task: str
    episodes: int
    slope: float
    error: float
    spread: float
    miss: float


def measured(task: str, *pairs: tuple[np.ndarray, np.ndarray]) -> Reach:
    """The least-squares slope of the hand's position on the object's, one for both axes.

    Args:
        task: its name, or one for all.
        pairs: of each task, where objects stood and where the hand closed, both (E, 2) in metres.
    """
    centred = [(place - place.mean(0), hand - hand.mean(0)) for place, hand in pairs]
    place, hand = (np.concatenate([pair[side] for pair in centred]) for side in (0, 1))
    freedom = 2 * (len(place) - len(pairs))
    square = float((place**2).sum())
    slope = float((place * hand).sum()) / square
    rest = float(((hand - slope * place) ** 2).sum()) / (freedom - 1)
    miss = float(((hand - place) ** 2).sum()) / freedom
    return Reach(task, len(place), slope, (rest / square) ** 0.5, 1000 * (square / freedom) ** 0.5, 1000 * miss**0.5)


def follow(policy: Policy, compute: ComputePolicy | None, name: str, options: Options) -> tuple[np.ndarray, np.ndarray] | None:
    """Where the object stood and where the hand first closed, each (E, 2); None for a task without an object to move."""
    env: Any = make(name)  # a LiberoEnv
    goals = [goal for goal in env.goal if goal[0] in MOVED]
    places, hands = [], []
    for seed in range(1000, 1000 + options.episodes if goals else 1000):
        env.restart(seed)
        place = LiberoScene(env).pose(goals[0][1])[0][:2].copy()
        generator, steps, closed = torch.Generator().manual_seed(seed), 0, False
        while steps < options.steps and not closed:
            for action in policy.act(env.observe(), compute, generator=generator).actions[: policy.n_action_steps]:
                closed = bool(action[-1] > 0)
                if closed:
                    break
                env.advance(np.asarray(action, np.float32))
                steps += 1
        if closed:
            places.append(place)
            hands.append(LiberoScene(env).hand[:2].copy())
    env.close()
    return (np.array(places).reshape(-1, 2), np.array(hands).reshape(-1, 2)) if goals else None


def main(options: Options) -> None:
    """Print one line per task, and one for all, as a table in markdown."""
    policy = Policy.from_pretrained(options.checkpoint)
    compute = None if options.compute == "auto" else parse(options.compute)
    print("| task | hand closed | slope | objects' spread, mm | hand against object, mm |\n|---|---|---|---|---|", flush=True)
    rows: list[Reach] = []
    pairs = []
    for name in expand_env_names(options.env):
        pair = follow(policy, compute, name, options)
        if pair is None:
            print(f"| {name} | no object to move | | | |", flush=True)
            continue
        if len(pair[0]) < FEWEST:
            print(f"| {name} | {len(pair[0])}/{options.episodes} | | | |", flush=True)
            continue
        pairs.append(pair)
        rows.append(measured(name, pair))
        print(_line(rows[-1], options.episodes), flush=True)
    if len(pairs) > 1:
        rows.append(measured("all", *pairs))
        print(_line(rows[-1], options.episodes * len(pairs)))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def _line(row: Reach, episodes: int) -> str:
    slope = f"{row.slope:.2f} ± {row.error:.2f}"
    return f"| {row.task} | {row.episodes}/{episodes} | {slope} | {row.spread:.1f} | {row.miss:.1f} |"


if __name__ == "__main__":
    main(tyro.cli(Options))
