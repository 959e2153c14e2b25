"""The picture of two good ways in docs/sampling.md, and how multimodal the draws are along an episode.

.venv/bin/python tools/draw_obstacle.py runs/obstacle/policy docs/images/obstacle.png

The checkpoint is one that was trained on obstacle/pass-v0. On the left, draws for the first observation of an episode with
their mean and their medoid, as the paths that the chunks stand for; on the right, the hand's paths through whole episodes.
Paths are shifted by the obstacle's position, which differs between episodes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vlaflow
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.multimodality import multimodality
from vlaflow.evaluation.rollout import EpisodeJob, RolloutConfig, one_thread, play
from vlaflow.policies.seeds import FIRST_SEED, chunk_generator
from vlaflow.simulators.obstacle import COLOURS, GOAL, HAND, OBSTACLE, STEP

ENV = "obstacle/pass-v0"
SHOWN, EPISODES = 8, 24
DRAWS, MEASURED = 16, 40
WAYS: tuple[tuple[str, ComputePolicy], ...] = (
    ("mean of eight draws", vlaflow.Consensus(8, "mean")),
    ("medoid of eight draws", vlaflow.Consensus(8, "medoid")),
)
DRAW, MEAN, MEDOID = "#8d99ae", "#d1495b", "#1b1b1e"


def draws(policy: Any, observation: Any, seed: int, chunk: int, number: int) -> np.ndarray:
    """Chunks for one observation, (K, L, 2)."""
    return np.stack(
        [policy.act(observation, vlaflow.Dense(), generator=chunk_generator(seed, chunk, r)).actions for r in range(number)]
    )


def path(hand: np.ndarray, chunk: np.ndarray) -> np.ndarray:
    """Positions of the hand while it executes a chunk, (L + 1, 2)."""
    moves = np.concatenate([np.zeros((1, 2)), STEP * np.clip(chunk, -1, 1)])
    return hand + moves.cumsum(0)


def episode(policy: Any, env: Any, compute: ComputePolicy, seed: int) -> tuple[np.ndarray, bool]:
    """The hand's path through an episode relative to the obstacle, (T, 2), and whether it succeeded."""
    seen: list[np.ndarray] = []
    job = EpisodeJob(ENV, compute, seed)
    result = play(
        policy, env, job, RolloutConfig(), before=lambda step, observation, chunk: seen.append(path(env.hand, chunk.actions))
    )
    executed = policy.config.n_action_steps
    steps = np.concatenate([part[:executed] for part in seen])[: result.steps]
    return np.concatenate([steps, env.hand[None]]) - env.obstacle, result.success


def along(policy: Any, env: Any) -> list[float]:
    """Mean multimodality of the draws at each of the first chunks, over the episodes that last so long."""
    found: list[list[float]] = []

    def measure(step: int, observation: Any, chunk: Any) -> None:
        number = step // policy.config.n_action_steps
        draw_KLD = torch.from_numpy(draws(policy, observation, seed, number, DRAWS))
        found.extend([[] for _ in range(number + 1 - len(found))])
        found[number].append(multimodality(draw_KLD[None]).item())

    for seed in range(FIRST_SEED, FIRST_SEED + MEASURED):
        play(policy, env, EpisodeJob(ENV, vlaflow.Dense(), seed), RolloutConfig(), before=measure)
    return [float(np.mean(values)) for values in found if len(values) > MEASURED // 2]


def scene(axis: Any, env: Any, title: str) -> None:
    """The table around the obstacle."""
    from matplotlib.patches import Circle

    def colour(name: str) -> tuple[float, ...]:
        return tuple(c / 255 for c in COLOURS[name])

    axis.set_facecolor(colour("table"))
    axis.add_patch(Circle((0, 0), OBSTACLE, color=colour("obstacle"), lw=0))
    axis.add_patch(Circle((0, 0), OBSTACLE + HAND, fill=False, ec=colour("obstacle"), lw=0.8, ls=":"))
    if env is not None:
        axis.add_patch(Circle(env.goal - env.obstacle, GOAL, color=colour("goal"), lw=0))
        axis.add_patch(Circle(env.hand - env.obstacle, HAND, color=colour("hand"), lw=0))
    axis.set(xlim=(-0.45, 0.45), ylim=(-0.5, 0.5), xticks=[], yticks=[], aspect="equal")
    axis.set_title(title, fontsize=10)


def main(checkpoint: str, out: str) -> None:
    """Draw the picture and print the measure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    policy, env = vlaflow.Policy.from_pretrained(checkpoint), vlaflow.make(ENV)
    picture = Figure((9.6, 3.9), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(picture)
    first, *others = picture.subplots(1, 1 + len(WAYS))

    env.restart(FIRST_SEED)
    chunk_KLD = draws(policy, env.observe(), FIRST_SEED, 0, SHOWN)
    hand: Any = env.hand - env.obstacle  # type: ignore[attr-defined]
    scene(first, env, f"{SHOWN} draws for one observation")
    for chunk in chunk_KLD:
        first.plot(*path(hand, chunk).T, color=DRAW, lw=1)
    apart_KK = np.sqrt(((chunk_KLD[:, None] - chunk_KLD[None]) ** 2).mean(3)).mean(2)
    first.plot(*path(hand, chunk_KLD.mean(0)).T, color=MEAN, lw=2.5, ls="--", label="mean")
    first.plot(*path(hand, chunk_KLD[apart_KK.sum(1).argmin()]).T, color=MEDOID, lw=2.5, label="medoid")
    first.plot([], [], color=DRAW, lw=1, label="draw")
    first.legend(loc="lower right", fontsize=8, framealpha=0.9)

    for axis, (title, compute) in zip(others, WAYS, strict=True):
        paths = [episode(policy, env, compute, seed) for seed in range(FIRST_SEED, FIRST_SEED + EPISODES)]
        successes = sum(success for _, success in paths)
        scene(axis, None, f"{title}: {successes} of {EPISODES} pass")
        for steps, success in paths:
            axis.plot(*steps.T, color=MEDOID if success else MEAN, lw=0.9, ls="-" if success else "--")
            axis.plot(*steps[-1], "o" if success else "x", color=MEDOID if success else MEAN, ms=4 if success else 6)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(192).save(out, optimize=True)
    measured = ", ".join(f"{value:.2f}" for value in along(policy, env))
    sys.stdout.write(f"{Path(out)}; multimodality of {DRAWS} draws at chunk 0, 1, ...: {measured}\n")


if __name__ == "__main__":
    with one_thread():
        main(*sys.argv[1:])
