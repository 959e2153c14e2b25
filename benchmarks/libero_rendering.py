"""Environment steps per second of a LIBERO evaluation, against the stock OffScreenRenderEnv, which renders at every step.

    python -m benchmarks.libero_rendering

Every way executes the same actions from the same stored initial state; that they lead to the same states, to the bit, is
tested in tests/simulators/test_libero.py. The library's ways include a reset with its ten settling steps; the stock
environment only sets the stored state, because its own reset takes seconds. A second table compares whole resets. The stock
environment runs in a process of its own, because closing it would take the OpenGL contexts of this one with it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks._timing import Case, report, say, seconds_in_turns
from vlaflow.simulators import expand_env_names, make
from vlaflow.simulators.base import Environment, Render
from vlaflow.simulators.chunks import ChunkEnv

SEED = 1000
SETTLE = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        envs: environments or groups.
        n_action_steps: actions per chunk, so one observation in this many steps where rendering is lazy.
        steps: actions per round and way.
        size: side of both images.
        rounds: rounds.
        json: file for the results.
    """

    envs: tuple[str, ...] = ("libero/spatial/0", "libero/object/0")
    n_action_steps: int = 8
    steps: int = 96
    size: int = 128
    rounds: int = 3
    json: Path | None = None


def serve_stock(pipe: Connection, task: str, size: int) -> None:
    """Run the stock environment: receive "reset" or actions (T, 7), answer when it is done."""
    from vlaflow.simulators.libero_package import files, load
    from vlaflow.simulators.libero_tasks import TASKS

    envs = load()
    bddl, states = files(TASKS[task])
    env = envs.OffScreenRenderEnv(bddl_file_name=str(bddl), camera_heights=size, camera_widths=size)
    env.seed(SEED)
    env.reset()
    pipe.send("ready")
    while True:
        what = pipe.recv()
        if isinstance(what, str):
            env.reset()
        env.set_init_state(states[0])
        for action in [SETTLE] * 10 if isinstance(what, str) else what:
            env.step(action)
        pipe.send("done")


class Stock:
    """The stock environment in another process."""

    def __init__(self, task: str, size: int) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        context: Any = multiprocessing.get_context("spawn")
        self._process = context.Process(target=serve_stock, args=(theirs, task, size), daemon=True)
        self._process.start()
        self._pipe.recv()

    def do(self, what: Any) -> Callable[[], None]:
        """A call that lets it execute something and waits for the end."""

        def run() -> None:
            self._pipe.send(what)
            self._pipe.recv()

        return run

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def playing(env: Environment, actions: np.ndarray, n_action_steps: int | None) -> Callable[[], None]:
    """Execute the actions, with an observation before every chunk; None for no observation at all."""

    def run() -> None:
        chunked = ChunkEnv(env, n_action_steps or len(actions))
        if n_action_steps is None:
            chunked.restart(SEED)
            chunked.execute(actions)
            return
        chunked.reset(seed=SEED)
        for start in range(0, len(actions), n_action_steps):
            chunked.step(actions[start : start + n_action_steps])

    return run


def measure(name: str, options: Options) -> list[Case]:
    """All ways of one environment, and its reset."""
    say(name)
    size, n = options.size, options.n_action_steps
    # Small movements with an open gripper, so that no episode ends by success.
    actions = np.random.default_rng(0).uniform(-0.3, 0.3, (options.steps, 7)).astype(np.float32)
    actions[:, 6] = -1

    def env(render: Render = "fast") -> Environment:
        return make(name, render=render, size=size)

    stock = Stock(name.partition("/")[2], size)
    fast, exact = env(), env("exact")
    arms = {
        f"fast {size}², when looked at": playing(fast, actions, n),
        f"fast {size}², every step": playing(fast, actions, 1),
        f"exact {size}², when looked at": playing(exact, actions, n),
        f"exact {size}², every step": playing(exact, actions, 1),
        f"stock {size}², every step": stock.do(actions.astype(np.float64)),
        "no images at all": playing(fast, actions, None),
    }
    notes = {"steps per round": options.steps, "views": 2, "when looked at": f"one observation in {n} steps"}
    cases = [Case.of_rates(name, "steps/s", options.steps, seconds_in_turns(arms, options.rounds), notes)]
    resets = {"restart": lambda: fast.restart(SEED), "stock reset": stock.do("reset")}
    cases.append(Case(f"{name}, reset and settling", "s", seconds_in_turns(resets, options.rounds)))
    stock.close()
    for used in (fast, exact):
        used.close()
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    cases = [case for name in expand_env_names(options.envs) for case in measure(name, options)]
    return report("libero_rendering", options, cases, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
