"""Environment steps per second of a Meta-World evaluation: rendering what the policy looks at, against rendering every step.

    python -m benchmarks.evaluation

The policy is a list of actions made beforehand by the scripted expert, so that nothing but the simulator is timed. Every way
runs the same episodes from reset to success, and must end in the same state after the same number of steps, to the bit; what
differs is how often an image is taken and of what quality. One process; workers multiply all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks._timing import Case, report, say, seconds_in_turns
from vlaflow.simulators import expand_env_names, make
from vlaflow.simulators.base import Environment, Render
from vlaflow.simulators.chunks import ChunkEnv
from vlaflow.simulators.experts import expert_for


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        envs: environments or groups.
        n_action_steps: actions per chunk, so one image in this many steps where rendering is lazy.
        episodes: per round and way.
        steps: most steps of an episode.
        fast_size, exact_size: sides of the images.
        rounds: rounds.
        json: file for the results.
    """

    envs: tuple[str, ...] = (
        "metaworld/drawer-open-v3",
        "metaworld/button-press-topdown-v3",
        "metaworld/window-close-v3",
    )
    n_action_steps: int = 8
    episodes: int = 2
    steps: int = 500
    fast_size: int = 96
    exact_size: int = 480
    rounds: int = 5
    json: Path | None = None


@dataclass(frozen=True)
class Script:
    """One episode's actions, (T, D), and the privileged state they lead to."""

    seed: int
    actions: np.ndarray
    end: np.ndarray


def write_script(env: Environment, seed: int, steps: int) -> Script:
    """Let the expert act until success, without a single image."""
    expert, actions, done = expert_for(env.name), [], False
    env.restart(seed)
    while not done and len(actions) < steps:
        actions.append(expert(env))
        _, terminated, truncated, _ = env.advance(actions[-1])
        done = terminated or truncated
    return Script(seed, np.stack(actions), _state(env))


def every_step(env: Environment, scripts: Sequence[Script]) -> Callable[[], None]:
    """An image after every action, as a plain gymnasium loop takes them."""

    def run() -> None:
        for script in scripts:
            env.reset(seed=script.seed)
            for action in script.actions:
                env.step(action)
            _require_end(env, script)

    return run


def when_looked_at(env: Environment, scripts: Sequence[Script], n_action_steps: int) -> Callable[[], None]:
    """An image before every chunk."""
    chunked = ChunkEnv(env, n_action_steps)

    def run() -> None:
        for script in scripts:
            chunked.reset(seed=script.seed)
            for start in range(0, len(script.actions), n_action_steps):
                chunked.step(script.actions[start : start + n_action_steps])
            _require_end(env, script)

    return run


def never(env: Environment, scripts: Sequence[Script]) -> Callable[[], None]:
    """Physics alone: what no rendering could be faster than."""

    def run() -> None:
        for script in scripts:
            env.restart(script.seed)
            for action in script.actions:
                env.advance(action)
            _require_end(env, script)

    return run


def measure(name: str, options: Options) -> Case:
    """All ways of one environment."""

    def env(render: Render = "fast") -> Environment:
        return make(name, render=render, size=options.fast_size if render == "fast" else options.exact_size)

    scripts = [write_script(env(), 1000 + i, options.steps) for i in range(options.episodes)]
    steps = sum(len(script.actions) for script in scripts)
    say(f"{name}: {steps} steps per round and way")
    fast, exact = f"fast {options.fast_size}²", f"exact {options.exact_size}²"
    arms = {
        f"{fast}, when looked at": when_looked_at(env(), scripts, options.n_action_steps),
        f"{fast}, every step": every_step(env(), scripts),
        f"{exact}, when looked at": when_looked_at(env("exact"), scripts, options.n_action_steps),
        f"{exact}, every step": every_step(env("exact"), scripts),
        "no images at all": never(env(), scripts),
    }
    return Case.of_rates(name, "steps/s", steps, seconds_in_turns(arms, options.rounds), {"steps per round": steps})


def _state(env: Environment) -> np.ndarray:
    return np.array(env.raw_observation)  # type: ignore[attr-defined]


def _require_end(env: Environment, script: Script) -> None:
    if not np.array_equal(_state(env), script.end):
        raise SystemExit(f"{env.name}: the episode of seed {script.seed} ended in another state than its script")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    cases = [measure(name, options) for name in expand_env_names(options.envs)]
    return report("evaluation", options, cases, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
