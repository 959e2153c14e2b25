"""What ``vlaflow demo`` can show: the tasks, recipes and sizes of each plan. The steps are the same for all (``demo``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlaflow.ranges import NotNegative

CALIBRATION = "adaptive"
COMPUTES = ("auto", "dense", "refine", f"exit:{CALIBRATION}")


@dataclass(frozen=True)
class Protocol:
    """An evaluation of a plan's policy.

    Args:
        name: of its folder inside the demo's; empty for the plan's main evaluation, which lies in the demo's folder itself, and
            alone has videos and the language check.
        first_seed: of its episodes.
        max_steps: step limit; None for the suite's.
        computes: compute policies.
    """

    name: str = ""
    first_seed: int = 1000
    max_steps: int | None = None
    computes: tuple[str, ...] = COMPUTES

    @property
    def step(self) -> str:
        """Name of its step of the demo."""
        return f"evaluate {self.name}".strip()


@dataclass(frozen=True)
class Plan:
    """One demo.

    Args:
        out: default folder.
        title: the tasks' simulator, for the report.
        envs: the tasks, or a group of them.
        policy: recipe of the policy.
        rater: recipe of its confidence rater; None for none.
        episodes: demonstrations per task.
        noise, noise_memory: of the demonstrations, as in ``vlaflow record``; of several, episodes take turns. Noise that lasts
            shows how to return to a handle that was missed, without which a policy misses it again (docs/log.md).
        eval_episodes: episodes per task and compute policy.
        steps: training steps of the policy; None for the recipe's own.
        rater_steps: most training steps of the rater, which would go on improving for some minutes more.
        language_episodes: episodes of the language check.
        packages: import names that it needs, besides those of training and reports.
        extra: the extra that brings them.
        size: side of the recorded images in pixels; None for the suite's.
        protocols: the evaluations, the main one first.
    """

    out: str
    title: str
    envs: tuple[str, ...]
    policy: str
    rater: str | None
    episodes: int
    noise: tuple[float, ...]
    noise_memory: tuple[float, ...]
    eval_episodes: int
    steps: int | None
    rater_steps: int | None
    language_episodes: int
    packages: tuple[str, ...]
    extra: str
    size: int | None = None
    protocols: tuple[Protocol, ...] = (Protocol(),)

    @property
    def final(self) -> str:
        """Folder of the checkpoint that is evaluated, inside the demo's."""
        return "rated" if self.rater else "policy"


PLANS = {
    "metaworld": Plan(
        out="runs/demo",
        title="Meta-World",
        envs=("metaworld/drawer-open-v3", "metaworld/button-press-topdown-v3", "metaworld/window-close-v3"),
        policy="asyncvla.demo",
        rater="asyncvla.rater",
        episodes=50,
        noise=(0.2,),
        noise_memory=(0.8,),
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
        noise=(0.1,),
        noise_memory=(0.0,),
        eval_episodes=10,
        steps=2000,
        rater_steps=250,
        language_episodes=3,
        packages=("libero", "mujoco"),
        extra="demo,libero",
    ),
    "mt50": Plan(
        out="runs/mt50",
        title="Meta-World",
        envs=("metaworld/all",),
        policy="asyncvla.mt50_small",
        rater=None,
        episodes=50,
        noise=(0.1, 0.2),
        noise_memory=(0.0, 0.8),
        eval_episodes=10,
        steps=None,
        rater_steps=None,
        language_episodes=0,
        packages=("metaworld", "mujoco"),
        extra="demo",
        size=192,
        protocols=(
            Protocol(computes=("auto", "dense", "mean:8", f"exit:{CALIBRATION}")),
            Protocol("evo1", first_seed=4042, max_steps=400, computes=("auto",)),
        ),
    ),
}


@dataclass(frozen=True)
class DemoRecord:
    """The content of demo.json."""

    settings: dict[str, Any]
    done: tuple[str, ...]
    seconds: dict[str, NotNegative]
