"""What ``vlaflow demo`` can show: the tasks, recipes and sizes of each plan. The steps are the same for all (``demo``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlaflow.ranges import NotNegative


@dataclass(frozen=True)
class Plan:
    """One demo.

    Args:
        out: default folder.
        title: the tasks' simulator, for the report.
        envs: the tasks.
        policy: recipe of the policy.
        rater: recipe of its confidence rater.
        episodes: demonstrations per task.
        noise, noise_memory: of the demonstrations, as in ``vlaflow record``. Noise that lasts shows how to return to a handle
            that was missed, without which a policy misses it again (docs/log.md).
        eval_episodes: episodes per task and compute policy.
        steps: training steps of the policy; None for the recipe's own.
        rater_steps: most training steps of the rater, which would go on improving for some minutes more.
        language_episodes: episodes of the language check.
        packages: import names that it needs, besides those of training and reports.
        extra: the extra that brings them.
    """

    out: str
    title: str
    envs: tuple[str, ...]
    policy: str
    rater: str
    episodes: int
    noise: float
    noise_memory: float
    eval_episodes: int
    steps: int | None
    rater_steps: int
    language_episodes: int
    packages: tuple[str, ...]
    extra: str


PLANS = {
    "metaworld": Plan(
        out="runs/demo",
        title="Meta-World",
        envs=("metaworld/drawer-open-v3", "metaworld/button-press-topdown-v3", "metaworld/window-close-v3"),
        policy="asyncvla.demo",
        rater="asyncvla.rater",
        episodes=50,
        noise=0.2,
        noise_memory=0.8,
        eval_episodes=20,
        steps=None,
        rater_steps=250,
        language_episodes=5,
        packages=("metaworld", "mujoco"),
        extra="demo",
    ),
    "libero": Plan(
        out="runs/libero-demo",
        title="LIBERO-Object",
        envs=("libero/object/0", "libero/object/1", "libero/object/3"),
        policy="asyncvla.libero_small",
        rater="asyncvla.rater",
        episodes=40,
        noise=0.1,
        noise_memory=0.0,
        eval_episodes=10,
        steps=2000,
        rater_steps=250,
        language_episodes=3,
        packages=("libero", "mujoco"),
        extra="demo,libero",
    ),
}


@dataclass(frozen=True)
class DemoRecord:
    """The content of demo.json."""

    settings: dict[str, Any]
    done: tuple[str, ...]
    seconds: dict[str, NotNegative]
